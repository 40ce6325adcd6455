"""Fusion of tasks into hTasks by dynamic programming (paper section 3.3).

Tasks are sorted by tokens per micro-batch and cut into contiguous groups:

    F(i, n) = min over j of F(j, n - 1) + cost(tasks j..i)

with the time of a group on the pipeline's slowest stage as its cost. All group counts ``n`` are returned, for
the schedule decides between them: few large groups use operators better, many small ones fill the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from muxtune.alignment import Alignment
from muxtune.errors import SpecError
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import HTaskChoice, Mesh

CHUNK_CANDIDATES = 3
"""Chunk lengths tried per group: the smallest power of two that holds every sequence, and its doublings."""


def best_cuts(cost_s: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """Cheapest contiguous partition for every number of groups; numbers without a finite one are left out.

    Args:
        cost_s: ``[n, n + 1]``; of the group from its first task to the task before its end.

    Returns:
        Per partition where it is cut, from 0 to ``n``.
    """
    count = len(cost_s)
    least = np.full(count + 1, np.inf)  # of tasks 0 to i, in as many groups as the round says
    least[0] = 0.0
    starts: list[NDArray[np.intp]] = []
    found = []
    for groups in range(1, count + 1):
        totals = least[:count, None] + cost_s
        starts.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
        if np.isfinite(least[count]):
            cuts = [count]
            for n in range(groups - 1, -1, -1):
                cuts.append(int(starts[n][cuts[-1]]))
            found.append(tuple(reversed(cuts)))
    return found


def sort_by_tokens(problem: PlanningProblem) -> list[str]:
    """Task ids by tokens per micro-batch of the task alone, packed; ties in the order of the workload."""
    return sorted(problem.data, key=lambda task_id: problem.shape((task_id,), "pack").tokens)


def cheapest_alignment(
    problem: PlanningProblem,
    mesh: Mesh,
    *,
    alignment: Alignment | None = None,
    chunk_tokens: int | None = None,
) -> Callable[[tuple[str, ...]], HTaskChoice]:
    """A function that gives a group the alignment with the least time on the slowest stage.

    Args:
        problem: What is planned.
        mesh: Given.
        alignment: Only this one.
        chunk_tokens: Only this chunk length.
    """

    def align(task_ids: tuple[str, ...]) -> HTaskChoice:
        candidates = [
            HTaskChoice(task_ids=task_ids, shape=problem.shape(task_ids, kind, chunk, dp=mesh.dp))
            for kind, chunk in alignment_candidates(problem, task_ids, alignment, chunk_tokens)
        ]
        return min(candidates, key=lambda c: problem.htask_times(c, mesh).slowest_s)

    return align


def alignment_candidates(
    problem: PlanningProblem,
    task_ids: Sequence[str],
    alignment: Alignment | None = None,
    chunk_tokens: int | None = None,
) -> list[tuple[Alignment, int | None]]:
    """Alignments that are worth pricing, with their chunk lengths.

    Raises:
        SpecError: A chunk length is given for another alignment.
    """
    if chunk_tokens is not None:
        if alignment not in {None, "chunk"}:
            raise SpecError("--chunk-tokens", chunk_tokens, f"nothing: the alignment is {alignment}")
        return [("chunk", chunk_tokens)]
    candidates: list[tuple[Alignment, int | None]] = []
    if alignment in {None, "chunk"}:
        smallest = 1 << (problem.longest_sequence(task_ids) - 1).bit_length()
        candidates += [("chunk", smallest << i) for i in range(CHUNK_CANDIDATES)]
    if alignment in {None, "pack"}:
        candidates.append(("pack", None))
    if alignment in {None, "pad"}:
        candidates.append(("pad", None))
    return candidates
