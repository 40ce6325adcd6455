"""Fusion of tasks into hTasks by dynamic programming (paper section 3.3).

Tasks are sorted by tokens per micro-batch and cut into contiguous groups:

    F(i, n) = min over j of F(j, n - 1) + cost(tasks j..i)

with the time of a group on the pipeline's slowest stage as its cost. All group counts ``n`` are returned, for
the schedule decides between them: few large groups use operators better, many small ones fill the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from muxtune.alignment import Alignment
from muxtune.errors import SpecError
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import HTaskChoice, Mesh

CHUNK_CANDIDATES = 3
"""Chunk lengths tried per group: the smallest power of two that holds every sequence, and its doublings."""


def partitions_by_count(
    problem: PlanningProblem,
    mesh: Mesh,
    align: Callable[[tuple[str, ...]], HTaskChoice],
    feasible: Callable[[HTaskChoice], bool],
) -> list[tuple[HTaskChoice, ...]]:
    """Best partition into 1, 2, ... contiguous groups; counts without a feasible partition are left out.

    Args:
        problem: What is planned.
        mesh: Given.
        align: Chooses the alignment of a group.
        feasible: Whether a group fits the memory.
    """
    ordered = sort_by_tokens(problem)
    count = len(ordered)
    groups: dict[tuple[int, int], HTaskChoice] = {}
    cost: dict[tuple[int, int], float] = {}
    for start in range(count):
        for stop in range(start + 1, count + 1):
            choice = align(tuple(ordered[start:stop]))
            if not feasible(choice):
                break  # a longer group needs more memory still
            groups[start, stop] = choice
            price = problem.htask_times(choice, mesh)
            cost[start, stop] = choice.shape.microbatches * price.slowest_s
    best = [[math.inf] * (count + 1) for _ in range(count + 1)]  # [groups][tasks covered]
    cut = [[0] * (count + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for n in range(1, count + 1):
        for stop in range(n, count + 1):
            for start in range(n - 1, stop):
                total = best[n - 1][start] + cost.get((start, stop), math.inf)
                if total < best[n][stop]:
                    best[n][stop], cut[n][stop] = total, start
    found = []
    for n in range(1, count + 1):
        if math.isfinite(best[n][count]):
            found.append(_follow_cuts(cut, groups, n, count))
    return found


def _follow_cuts(
    cut: Sequence[Sequence[int]], groups: dict[tuple[int, int], HTaskChoice], n: int, count: int
) -> tuple[HTaskChoice, ...]:
    members: list[HTaskChoice] = []
    stop = count
    for k in range(n, 0, -1):
        start = cut[k][stop]
        members.append(groups[start, stop])
        stop = start
    return tuple(reversed(members))


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
