"""Long micro-batches cut into carry groups: which ones, and over how many micro-batches.

A pipeline goes at the pace of its longest micro-batches, and each stage keeps as many as it has open. The
sequences of a micro-batch may be cut over a carry group of 2 or 4 (:mod:`muxtune.batches.chunks`): a declared
micro-batch becomes a carry group, so nobody gets more sequences at once than declared, and an iteration has
as many tokens as before in more and shorter micro-batches. That takes nothing off the work of a stage, so it
pays where stages wait for long micro-batches, or where these do not fit the memory.

Every hTask could be cut in three ways, which is too many to try. Who is cut follows from a pace instead, to
which every hTask comes as near as it can; the paces that are tried go from the longest micro-batch down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.settings import SearchSettings
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.problem.layouts import carried_layouts
from muxtune.planning.problem.problem import PlanningProblem


def may_carry(options: PlanOptions) -> bool:
    """Whether carry groups are left to the search."""
    fixed = options.carry is not None or options.chunk_tokens is not None
    return not fixed and options.alignment in {None, "chunk"} and "chunking" not in options.without


def carries_at(
    pace_s: float, slot_s: NDArray[np.float64], tokens: NDArray[np.int64], settings: SearchSettings
) -> NDArray[np.int64]:
    """Micro-batches that each hTask's are cut into to come nearest to a pace, in proportion.

    Args:
        pace_s: Pace of the pipeline: seconds of a micro-batch on a stage.
        slot_s: Seconds of the hTasks' micro-batches on their slowest stage.
        tokens: Tokens of these micro-batches.
        settings: Say how much may be cut.
    """
    ratio = np.where(np.isfinite(slot_s), slot_s, 0.0) / pace_s
    carries = np.ones(ratio.shape, dtype=np.int64)
    for carry in settings.carries[1:]:
        nearest = ratio >= carry / np.sqrt(2)
        carries[nearest & (tokens >= carry * settings.least_cut_tokens)] = carry
    return carries


def carries_to_try(
    slot_s: NDArray[np.float64],
    tokens: NDArray[np.int64],
    longest_s: float,
    cuts: Sequence[float],
    settings: SearchSettings,
) -> Iterator[NDArray[np.int64]]:
    """Carries of all hTasks for every pace at which something is cut, without repetitions.

    Args:
        slot_s: As in :func:`carries_at`.
        tokens: As in :func:`carries_at`.
        longest_s: Seconds of the longest micro-batch.
        cuts: Paces, as ``longest_s`` over each of these.
        settings: Say how much may be cut.
    """
    known: set[bytes] = set()
    for cut in cuts:
        carries = carries_at(longest_s / cut, slot_s, tokens, settings)
        if carries.max() > 1 and carries.tobytes() not in known:
            known.add(carries.tobytes())
            yield carries


def cut_choice(problem: PlanningProblem, mesh: Mesh, task_ids: tuple[str, ...], carry: int) -> HTaskChoice:
    """A group whose micro-batches are cut, in the chunks that need fewest tokens.

    The rest of their price hardly depends on the chunks, and searches cut many groups.
    """
    layouts = carried_layouts(problem, task_ids, carry)
    shapes = [problem.shape(task_ids, *layout, dp=mesh.dp) for layout in layouts]
    return HTaskChoice(task_ids=task_ids, shape=min(shapes, key=lambda shape: shape.tokens))


def cut_variants(
    problem: PlanningProblem,
    htasks: Sequence[HTaskChoice],
    mesh: Mesh,
    *,
    longest_s: float | None = None,
    cuts: Sequence[float] | None = None,
) -> Iterator[tuple[HTaskChoice, ...]]:
    """The partition with long micro-batches cut, for every pace at which something is cut.

    Args:
        problem: The planning problem.
        htasks: The partition.
        mesh: The mesh.
        longest_s: Seconds whose parts are the paces; by default those of the partition's longest micro-batch.
        cuts: Paces, as ``longest_s`` over each of these; by default those of the settings.
    """
    if mesh.pp == 1:
        return
    settings = problem.settings
    slot_s = np.array([problem.htask_times(htask, mesh).slowest_s for htask in htasks])
    tokens = np.array([htask.shape.tokens for htask in htasks])
    longest_s = float(slot_s.max()) if longest_s is None else longest_s
    for carries in carries_to_try(slot_s, tokens, longest_s, cuts or settings.cuts, settings):
        yield tuple(
            htask if carry == 1 else cut_choice(problem, mesh, htask.task_ids, carry)
            for htask, carry in zip(htasks, carries.tolist(), strict=True)
        )
