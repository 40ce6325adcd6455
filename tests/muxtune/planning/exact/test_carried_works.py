"""Work of micro-batches whose sequences go on in later ones, against their layouts; and the plan's memory."""

from __future__ import annotations

import pytest

from muxtune.batches import attention_calls, layout_step, measure_shape
from muxtune.memory import carried_gradient_bytes, carried_kv_bytes
from muxtune.plan import check_plan, finish_plan
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.carried_works import carry_groups
from muxtune.planning.exact.works import sample_works
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.support.errors import SpecError
from sim import simulate_plan
from tests.muxtune.batches.carried import carried_attention_calls, carried_out_tokens
from tests.muxtune.planning.estimate.test_stream_tokens import UNEVEN
from tests.muxtune.planning.problems import make_problem
from tests.plans import changed

CHUNK = 32


def carrying(problem, carry):
    task_ids = tuple(problem.data)
    shape = measure_shape(
        [problem.data[task_id] for task_id in task_ids], "chunk", chunk_tokens=CHUNK, carry=carry
    )
    return HTaskChoice(task_ids=task_ids, shape=shape)


@pytest.mark.parametrize("carry", [2, 4])
def test_works_are_those_of_the_layouts(carry):
    problem = make_problem(UNEVEN)
    htask = carrying(problem, carry)
    members = [problem.data[task_id] for task_id in htask.task_ids]
    steps = min(each.task.steps for each in members)
    calls, carried_calls, left, targets = [], [], [], []
    for step in {0, round((steps - 1) / 2), steps - 1}:
        layouts = layout_step(htask.shape, [data.batch_lengths(step) for data in members])
        calls += [attention_calls(layout) for layout in layouts]
        carried_calls += [carried_attention_calls(layout) for layout in layouts]
        left += [carried_out_tokens(layout) for layout in layouts]
        targets.append(sum(e.target_tokens for data in members for e in data.batch(step)))
    share = 1 / len(calls)
    works = sample_works(htask, problem.data)
    assert max(left) > 0
    assert works.mean.left_tokens == pytest.approx(sum(left) * share)
    assert works.mean.targets == pytest.approx(sum(targets) * share)
    for mean, all_ in (
        (works.mean.attention, calls),
        (works.mean.carried_attention, carried_calls),
    ):
        expected = sum(row[0] * row[-1] for each in all_ for row in each) * share
        assert sum(n * row[0] * row[-1] for n, *row in mean) == pytest.approx(expected)
    # For memory, a carry group that there is, and no sampled step has one that keeps more.
    groups = [range(first, first + carry) for first in range(0, len(calls), carry)]
    slots = [
        sum(left[i] + sum(row[0] * sum(row[1:]) for row in (*calls[i], *carried_calls[i])) for i in group)
        for group in groups
    ]
    fullest = groups[slots.index(max(slots))]
    assert [work.left_tokens for work in works.fullest] == [left[i] for i in fullest]
    assert [[call for _, *call in work.attention] for work in works.fullest] == [
        [list(call) for call in calls[i]] for i in fullest
    ]
    assert [[call for _, *call in work.carried_attention] for work in works.fullest] == [
        [list(call) for call in carried_calls[i]] for i in fullest
    ]


@pytest.mark.parametrize("chunk_tokens", [16, 48])
@pytest.mark.parametrize("carry", [2, 4])
def test_each_micro_batch_has_what_its_layout_has(carry, chunk_tokens):
    problem = make_problem(UNEVEN)
    members = list(problem.data.values())
    shape = measure_shape(members, "chunk", chunk_tokens=chunk_tokens, carry=carry)
    for step in range(min(each.task.steps for each in members)):
        works = [work for group in carry_groups(members, shape, step) for work in group]
        layouts = layout_step(shape, [data.batch_lengths(step) for data in members])
        for work, layout in zip(works, layouts, strict=True):
            assert work.task_tokens == tuple(span.stop - span.start for span in layout.spans)
            assert work.attention == tuple((1.0, *call) for call in attention_calls(layout))
            assert sorted(work.carried_attention) == sorted(
                (1.0, *call) for call in carried_attention_calls(layout)
            )
            assert work.left_tokens == carried_out_tokens(layout)
            targets = 0
            for segment in layout.segments:
                example = members[segment.task].batch(step)[segment.sequence]
                positions = range(segment.offset, segment.offset + segment.length)
                targets += sum(example.target_start <= i + 1 < len(example.tokens) for i in positions)
            assert work.targets == targets


def structure_of(problem, carry, template):
    layers = problem.model.layers
    return PlanStructure(
        htasks=(carrying(problem, carry),),
        buckets=((0,),),
        template=template,
        mesh=Mesh((layers - layers // 2, layers // 2)),
    )


@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_a_plan_schedules_carry_groups_and_has_their_keys_and_values_in_its_memory(template):
    problem = make_problem(UNEVEN)
    structure = structure_of(problem, 2, template)
    (htask,) = structure.htasks
    plan = assemble_plan(problem, structure, "made-by-hand")
    assert plan.carries == (2,)
    assert plan.shape(0) == htask.shape
    works = sample_works(htask, problem.data).fullest
    assert works[0].left_tokens > works[1].left_tokens == 0
    memory = problem.memory(structure, plan.actions)
    for stage, own in enumerate(memory):
        layers = structure.layers_per_stage[stage]
        left = carried_kv_bytes(problem.model, layers, tokens=works[0].left_tokens)
        gradient = carried_gradient_bytes(problem.model, layers, works=works)
        # The group before may be going back while this one comes in.
        assert own.chunk_kv_bytes in {left, 2 * left, left + gradient, 2 * left + gradient}
        assert own.total_bytes == plan.predicted.peak_memory_bytes[stage]


@pytest.mark.parametrize("template", ["flush", "continuous", "gpipe"])
@pytest.mark.parametrize("carry", [1, 2, 4])
def test_the_simulator_agrees_with_the_recurrence(template, carry):
    problem = make_problem(UNEVEN)
    plan = assemble_plan(problem, structure_of(problem, carry, template), "made-by-hand")
    simulated = simulate_plan(plan).predicted
    assert simulated.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=1e-9)
    assert simulated.makespan_s == pytest.approx(plan.predicted.makespan_s, rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"carry_microbatches": 3}, "carry_microbatches = 3: expected a power of two"),
        ({"carry_microbatches": 16}, "carry_microbatches = 16: expected a power of two that divides"),
        ({"alignment": "pack", "chunk_tokens": None}, "carry_microbatches = 2: expected 1: only chunks"),
    ],
)
def test_a_carry_group_that_cannot_be_is_refused(fields, message):
    problem = make_problem(UNEVEN)
    plan = assemble_plan(problem, structure_of(problem, 2, "flush"), "made-by-hand")
    broken = changed(plan, htasks=(plan.htasks[0].model_copy(update=fields),))
    with pytest.raises(SpecError, match=message):
        check_plan(finish_plan(broken))


def test_a_pipeline_with_one_micro_batch_per_htask_carries_nothing():
    problem = make_problem(UNEVEN)
    plan = assemble_plan(problem, structure_of(problem, 2, "continuous"), "made-by-hand")
    with pytest.raises(SpecError, match="carry_microbatches = 2: expected 1: under lorapp"):
        check_plan(changed(plan, template="lorapp"))
