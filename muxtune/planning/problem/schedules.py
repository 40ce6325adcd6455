"""The schedules of a partition: groupings into buckets, templates, and overlap inside of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from muxtune.orchestration import Mode
from muxtune.plan import Orchestration
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import SEQUENTIAL, HTaskChoice, Layout, Mesh, PlanStructure
from muxtune.planning.problem.layouts import cheapest_alignment
from muxtune.planning.problem.meshes import choose_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template

LayoutOf = Callable[[PlanningProblem, tuple[str, ...]], Layout]
"""Layout of the tasks of an hTask."""


def modes_to_try(problem: PlanningProblem, options: PlanOptions) -> tuple[Mode, ...]:
    """What stages with several ranks may overlap with, beside ``sequential``.

    On a CPU, communication takes computing time from the same cores: it is only tried where somebody has
    measured how much. From contention 1 on, overlap is worth nothing.
    """
    if options.orchestration is not None:
        return () if options.orchestration == "sequential" else (options.orchestration,)
    if "orchestration" in options.without:
        return ()
    contention = problem.costs.contention
    if contention is None:
        return () if problem.cluster.device.kind == "cpu" else problem.settings.modes
    return problem.settings.modes if contention < 1 else ()


def overlapping(problem: PlanningProblem, mode: Mode) -> Orchestration:
    """A mode on the problem's devices."""
    if mode == "sequential":
        return SEQUENTIAL
    return Orchestration(mode=mode, contention=problem.costs.contention or 0.0)


def orchestrated(
    problem: PlanningProblem,
    structures: Sequence[PlanStructure],
    latency_s: Sequence[float],
    modes: Sequence[Mode],
) -> Iterator[PlanStructure]:
    """Schedules whose stages overlap communication with computation.

    Where hTasks share clocks, pairs of near-equal ones do, in the order of the structure's latencies.
    """
    slowest_first = sorted(range(len(latency_s)), key=lambda h: (-latency_s[h], h))
    pairs = tuple(tuple(slowest_first[i : i + 2]) for i in range(0, len(slowest_first), 2))
    known: dict[PlanStructure, None] = {}
    for structure in structures:
        for mode in modes:
            orchestration = overlapping(problem, mode)
            known[replace(structure, orchestration=orchestration)] = None
            if orchestration.shares_clocks:
                known[replace(structure, buckets=pairs, orchestration=orchestration)] = None
    yield from known


def in_mode(
    problem: PlanningProblem, structures: Sequence[PlanStructure], latency_s: Sequence[float], mode: Mode
) -> list[PlanStructure]:
    """These schedules in a mode that is asked for: one that shares clocks shares some, if it can."""
    found = list(orchestrated(problem, structures, latency_s, [mode]))
    sharing = [s for s in found if s.orchestration.shares_clocks and max(map(len, s.buckets)) > 1]
    return sharing or found


def schedules(
    htasks: Sequence[HTaskChoice],
    latency_s: Sequence[float],
    mesh: Mesh,
    templates: Sequence[Template],
    most_groupings: int | None = None,
) -> Iterator[PlanStructure]:
    """Groupings and templates of a partition; see :func:`bucket_candidates`."""
    for template in templates:
        for buckets in bucket_candidates(latency_s, most_groupings):
            yield PlanStructure(htasks=tuple(htasks), buckets=buckets, template=template, mesh=mesh)


def bucket_candidates(
    latency_s: Sequence[float], most_counts: int | None = None
) -> list[tuple[tuple[int, ...], ...]]:
    """Balanced groupings into some numbers of buckets, buckets by descending latency.

    Inside a bucket the hTasks take turns, slowest first or slowest last. That decides who is left over at its
    end: if it is the hTask that also begins the next iteration, ``continuous`` has to drain for its step.

    Args:
        latency_s: Per hTask, seconds of one micro-batch on the slowest stage.
        most_counts: Numbers of buckets, from 1 to all hTasks in proportion; all of them if absent.

    Returns:
        Groupings by number of buckets, without repetitions.
    """
    counts = range(1, len(latency_s) + 1)
    if most_counts is not None and most_counts < len(latency_s):
        counts = np.unique(np.geomspace(1, len(latency_s), most_counts).round().astype(int)).tolist()
    groupings: dict[tuple[tuple[int, ...], ...], None] = {}  # a set that keeps the order
    for count in counts:
        slowest_first = balanced_buckets(latency_s, count)
        groupings[slowest_first] = None
        groupings[tuple(bucket[::-1] for bucket in slowest_first)] = None
    return list(groupings)


def balanced_buckets(latency_s: Sequence[float], count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` buckets of near-equal total latency: longest first, into the emptiest bucket."""
    slowest_first = sorted(range(len(latency_s)), key=lambda h: (-latency_s[h], h))
    buckets: list[list[int]] = [[] for _ in range(count)]
    filled = [0.0] * count
    for h in slowest_first:
        target = min(range(count), key=lambda b: (filled[b], b))
        buckets[target].append(h)
        filled[target] += latency_s[h]
    order = sorted(range(count), key=lambda b: (-filled[b], b))
    return tuple(tuple(buckets[b]) for b in order)


def aligned_groups(
    problem: PlanningProblem,
    options: PlanOptions,
    groups: Sequence[tuple[str, ...]],
    layout_of: LayoutOf | None = None,
) -> tuple[list[HTaskChoice], Mesh]:
    """Groups with their cheapest alignments, and the mesh with balanced layers per stage.

    Args:
        problem: The planning problem.
        options: May fix the mesh and the alignment.
        groups: Tasks of each hTask.
        layout_of: Chooses the layout of a group instead.

    Raises:
        SpecError: A sequence is longer than the chunk asked for, or there are fewer layers than stages.
    """
    dp = options.dp or 1
    if layout_of is not None:
        own = [(group, layout_of(problem, group)) for group in groups]
        htasks = [
            HTaskChoice(task_ids=group, shape=problem.shape(group, *layout, dp=dp)) for group, layout in own
        ]
        return htasks, choose_mesh(problem, htasks, options)
    packed = [HTaskChoice(task_ids=group, shape=problem.shape(group, "pack", dp=dp)) for group in groups]
    align = cheapest_alignment(problem, choose_mesh(problem, packed, options), options)
    htasks = [align(group) for group in groups]
    return htasks, choose_mesh(problem, htasks, options)


def pipeline_candidates(
    problem: PlanningProblem,
    htasks: Sequence[HTaskChoice],
    mesh: Mesh,
    templates: Sequence[Template],
) -> list[PlanStructure]:
    """All groupings and templates for a partition."""
    latency_s = [problem.htask_times(htask, mesh).slowest_s for htask in htasks]
    return list(schedules(htasks, latency_s, mesh, templates))


def in_order(htasks: Sequence[HTaskChoice], mesh: Mesh, template: Template) -> PlanStructure:
    """A structure without grouping: one bucket per hTask, in the order given."""
    buckets = tuple((h,) for h in range(len(htasks)))
    return PlanStructure(htasks=tuple(htasks), buckets=buckets, template=template, mesh=mesh)
