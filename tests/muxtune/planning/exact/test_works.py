"""Work of micro-batches against their layouts."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from muxtune.batches import attention_calls, layout_step, sequence_rows
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.bytes import plan_memory
from muxtune.planning.exact.works import sample_works
from muxtune.planning.problem.assemble import assemble_plan
from tests.muxtune.planning.estimate.test_stream_tokens import UNEVEN
from tests.muxtune.planning.problems import FakeCosts, make_problem


@pytest.mark.parametrize("dp", [1, 3])
@pytest.mark.parametrize("layout", [("pack", None), ("pad", None), ("chunk", 256)], ids=str)
def test_works_are_those_of_the_layouts(layout, dp):
    problem = make_problem(UNEVEN)
    for task_ids in (("t0",), ("t1", "t3", "t5"), tuple(problem.data)):
        htask = HTaskChoice(task_ids=task_ids, shape=problem.shape(task_ids, *layout, dp=dp))
        members = [problem.data[task_id] for task_id in task_ids]
        steps = min(each.task.steps for each in members)
        layouts, targets = [], []
        for step in {0, round((steps - 1) / 2), steps - 1}:
            for each in layout_step(htask.shape, [data.batch_lengths(step) for data in members]):
                layouts.append(each)
                targets.append(
                    sum(members[s.task].batch(step)[s.sequence].target_tokens for s in each.segments)
                )
        works = sample_works(htask, problem.data)
        calls = [attention_calls(each) for each in layouts]
        share = 1 / len(layouts)
        assert works.mean.attention == tuple(
            (n * share, *call) for call, n in sorted(Counter(chain(*calls)).items())
        )
        assert works.mean.targets == pytest.approx(sum(targets) * share)
        spans = [[span.stop - span.start for span in each.spans] for each in layouts]
        assert works.mean.task_tokens == tuple(
            round(sum(tokens) / len(layouts)) for tokens in zip(*spans, strict=True)
        )
        (fullest,) = works.fullest
        assert fullest.targets == max(targets)
        slots = [sum(sequences * row for sequences, row in each) for each in calls]
        assert sum(sequences * row for _, sequences, row in fullest.attention) == max(slots)


def test_memory_counts_the_slots_of_the_backend_and_prices_do_not_change():
    problem = make_problem(UNEVEN)
    htask = HTaskChoice(task_ids=("t1", "t3"), shape=problem.shape(("t1", "t3"), "pack"))
    default = sample_works(htask, problem.data)
    members = [problem.data[task_id] for task_id in htask.task_ids]
    steps = min(each.task.steps for each in members)
    most = max(
        sum(row.tokens for row in sequence_rows(layout.segments))
        for step in {0, round((steps - 1) / 2), steps - 1}
        for layout in layout_step(htask.shape, [data.batch_lengths(step) for data in members])
    )
    for attention in ("loop", "varlen"):
        works = sample_works(htask, problem.data, attention=attention)
        assert works.mean == default.mean
        slots = sum(sequences * row for _, sequences, row in works.fullest[0].attention)
        assert slots == most
        assert slots < sum(sequences * row for _, sequences, row in default.fullest[0].attention)


def test_a_plan_has_the_backend_that_its_costs_were_measured_with():
    class Looping(FakeCosts):
        attention = "loop"

    plans = {}
    for costs in (FakeCosts(), Looping()):
        problem = make_problem(UNEVEN[:2], costs=costs)
        htask = HTaskChoice(task_ids=("t0", "t1"), shape=problem.shape(("t0", "t1"), "pack"))
        structure = PlanStructure(htasks=(htask,), buckets=((0,),), template="flush", mesh=Mesh((2, 2)))
        plan = assemble_plan(problem, structure, "made-by-hand")
        plans[plan.execution.attention] = plan
        memory = [stage.total_bytes for stage in plan_memory(plan)]
        assert memory == list(plan.predicted.peak_memory_bytes)
    assert plans["loop"].predicted.peak_memory_bytes < plans["grouped"].predicted.peak_memory_bytes
