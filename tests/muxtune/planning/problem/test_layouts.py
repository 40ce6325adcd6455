"""Fusion DP against brute force over all contiguous partitions."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.partition_dp import cheapest_cuts
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh
from muxtune.planning.exact.works import sample_works
from muxtune.planning.problem.layouts import alignment_candidates, cheapest_alignment, sort_by_tokens
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, FakeCosts, make_problem

MESH = Mesh((2, 2))


def contiguous_partitions(ordered: list[str], groups: int) -> list[list[tuple[str, ...]]]:
    cuts = combinations(range(1, len(ordered)), groups - 1)
    return [[tuple(ordered[a:b]) for a, b in pairwise((0, *cut, len(ordered)))] for cut in cuts]


def total_s(problem: PlanningProblem, groups: list[tuple[str, ...]]) -> float:
    align = cheapest_alignment(problem, MESH, FREE)
    choices = [align(group) for group in groups]
    return sum(c.shape.microbatches * problem.htask_times(c, MESH).slowest_s for c in choices)


def cut(problem: PlanningProblem, most_tasks: int) -> list[list[tuple[str, ...]]]:
    """Best contiguous partitions, in groups of at most so many tasks."""
    ordered = sort_by_tokens(problem)
    count = len(ordered)
    cost_s = np.full((count, most_tasks), np.inf)
    for end in range(count):
        for w in range(min(most_tasks, end + 1)):
            cost_s[end, w] = total_s(problem, [tuple(ordered[end - w : end + 1])])
    cuts = cheapest_cuts(cost_s, count)
    places = [cuts.places(groups) for groups in np.flatnonzero(np.isfinite(cuts.total))]
    return [[tuple(ordered[e - w : e + 1]) for e, w in zip(*place, strict=True)] for place in places]


@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 2e-3])
def test_dp_finds_the_best_contiguous_partition_for_every_count(launch_s):
    problem = make_problem(costs=FakeCosts(launch_s=launch_s))
    ordered = sort_by_tokens(problem)
    found = cut(problem, len(ordered))
    assert [len(groups) for groups in found] == [1, 2, 3, 4, 5]
    for groups in found:
        assert [task_id for group in groups for task_id in group] == ordered
        best = min(total_s(problem, p) for p in contiguous_partitions(ordered, len(groups)))
        assert total_s(problem, groups) == pytest.approx(best, rel=1e-12)


def test_groups_that_do_not_fit_the_memory_are_never_used():
    found = cut(make_problem(), 2)
    assert [len(groups) for groups in found] == [3, 4, 5]
    assert all(len(group) <= 2 for groups in found for group in groups)


def test_cheapest_alignment_beats_every_candidate():
    problem = make_problem()
    group = ("t0", "t1", "t3")
    chosen = problem.htask_times(cheapest_alignment(problem, MESH, FREE)(group), MESH).slowest_s
    for kind, chunk, _ in alignment_candidates(problem, group, FREE):
        align = cheapest_alignment(problem, MESH, PlanOptions(alignment=kind, chunk_tokens=chunk))
        assert chosen <= problem.htask_times(align(group), MESH).slowest_s


def test_chunk_candidates_are_powers_of_two_that_hold_every_sequence():
    problem = make_problem()
    for task_id in problem.data:
        longest = problem.longest_sequence((task_id,))
        found = alignment_candidates(problem, (task_id,), FREE)
        chunks = [layout.chunk_tokens for layout in found if layout.alignment == "chunk"]
        assert all(c is not None and c >= longest and c & (c - 1) == 0 for c in chunks)
        assert min(chunks) < 2 * longest  # type: ignore[type-var,operator]


def test_beside_chunks_alone_there_are_lengths_below_the_longest_sequence():
    problem = make_problem()
    found = alignment_candidates(problem, ("t1",), PlanOptions(alignment="chunk"))
    lengths = [layout.chunk_tokens for layout in found]
    assert lengths == [32, 64, 128, 256, 512, 1024]
    assert problem.longest_sequence(("t1",)) == 256
    assert all(layout.carry == 1 for layout in found)


@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_pack_holds_the_same_attention_in_no_more_tokens(chunk):
    """So short chunks are not tried beside it."""
    problem = make_problem()
    for task_ids in (("t1",), ("t1", "t2"), tuple(problem.data)):
        packed, chunked = (
            HTaskChoice(task_ids=task_ids, shape=problem.shape(task_ids, *layout))
            for layout in (Layout("pack"), Layout("chunk", chunk))
        )
        assert packed.shape.tokens <= chunked.shape.tokens
        works = [sample_works(each, problem.data).mean for each in (packed, chunked)]
        slots = [sum(n * rows * length for n, rows, length in work.attention) for work in works]
        # Which sequences share a micro-batch may differ a little.
        assert slots[0] == pytest.approx(slots[1], rel=0.03)


def test_carry_groups_that_are_asked_for_have_the_chunks_that_are_asked_for():
    problem = make_problem()
    fixed = PlanOptions(carry=2, chunk_tokens=32)
    assert alignment_candidates(problem, ("t1",), fixed) == [Layout("chunk", 32, 2)]
    by_cost = alignment_candidates(problem, ("t1",), PlanOptions(carry=2))
    assert by_cost == [Layout("chunk", 64, 2), Layout("chunk", 16, 2)]
    shape = cheapest_alignment(problem, MESH, fixed)(("t1",)).shape
    declared = problem.data["t1"].task.declared_microbatches
    assert (shape.microbatches, shape.carry, shape.row_tokens) == (2 * declared, 2, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(carry=3), "--carry = 3: expected a power of two"),
        (PlanOptions(carry=2, alignment="pack"), "--carry = 2: expected nothing: the alignment is pack"),
        (PlanOptions(chunk_tokens=8, alignment="pad"), "--chunk-tokens = 8: expected nothing"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message):
    with pytest.raises(SpecError, match=message):
        alignment_candidates(make_problem(), ("t1",), options)


def test_tasks_are_sorted_by_their_tokens_per_microbatch():
    problem = make_problem(MIXED)
    tokens = [problem.shape((task_id,), "pack").tokens for task_id in sort_by_tokens(problem)]
    assert tokens == sorted(tokens)
