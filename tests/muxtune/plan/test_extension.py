"""The schedule of a whole run: valid, complete, and what the plan shows where it is made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.plan import Orchestration, Plan, check_step_meetings, extend_schedule
from muxtune.schedule import Action, build_schedule, check_schedule
from muxtune.support.errors import SpecError
from tests.plans import changed, entries, make_plan
from tests.sampling import examples


def _with_schedule(plan: Plan, stages: list[list[Action]], iterations: int) -> Plan:
    predicted = plan.predicted.model_copy(update={"scheduled_iterations": iterations})
    return changed(plan, schedule=entries(stages), predicted=predicted)


def _with_steps(plan: Plan, steps: list[int]) -> Plan:
    tasks = tuple(t.model_copy(update={"steps": n}) for t, n in zip(plan.tasks, steps, strict=True))
    plan = changed(plan, tasks=tasks)
    shown = plan.htask_steps(plan.predicted.scheduled_iterations)
    pp = plan.parallelism.pp
    stages = build_schedule(plan.buckets, plan.microbatches, pp=pp, template=plan.template, steps=shown)
    return _with_schedule(plan, stages, plan.predicted.scheduled_iterations)


def _by_hand(plan: Plan) -> Plan:
    """All forwards, then all backwards: valid on one stage without an in-flight limit, and not ours."""
    own = [Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("STEP", 0, 0)]
    other = [Action("F", 1, 0), Action("B", 1, 0), Action("F", 1, 1), Action("B", 1, 1), Action("STEP", 1, 0)]
    return _with_schedule(plan, [own + other] * plan.parallelism.pp, 1)


@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_a_generated_schedule_is_generated_for_the_wanted_length(template):
    plan = make_plan(template=template)
    expected = build_schedule(plan.buckets, plan.microbatches, pp=2, template=template, steps=[4, 4])
    assert extend_schedule(plan, 4) == expected


def test_an_htask_leaves_after_its_own_last_step():
    plan = _with_steps(make_plan(), [2, 3, 6])
    stages = extend_schedule(plan, 6)
    check_schedule(stages, plan.microbatches)
    steps = [(a.htask, a.number) for a in stages[0] if a.kind == "STEP"]
    assert sorted(steps) == [(0, k) for k in range(3)] + [(1, k) for k in range(6)]


def test_a_hand_made_schedule_is_repeated_verbatim():
    plan = _by_hand(make_plan())
    check_schedule(plan.actions, plan.microbatches)
    stages = extend_schedule(plan, 3)
    check_schedule(stages, plan.microbatches)
    shown = plan.actions[0]
    again = [Action(a.kind, a.htask, a.number + (1 if a.kind == "STEP" else 2)) for a in shown]
    assert stages[0][: 2 * len(shown)] == shown + again


def test_a_hand_made_schedule_of_two_iterations_refuses_an_odd_number():
    plan = _by_hand(make_plan())
    two = _with_schedule(plan, extend_schedule(plan, 2), 3)
    assert extend_schedule(two, 4) == extend_schedule(plan, 4)
    with pytest.raises(SpecError, match="steps = 3: expected a multiple of 2"):
        extend_schedule(two, 3)


def test_a_hand_made_schedule_without_a_step_of_every_htask_is_refused():
    plan = make_plan()
    only_one = [[a for a in stage if a.htask == 0] for stage in plan.actions]
    with pytest.raises(SpecError, match="0 steps of hTask 1"):
        extend_schedule(_with_schedule(plan, only_one, 3), 3)


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_steps_beyond_the_longest_task_are_refused(steps):
    with pytest.raises(SpecError, match=f"steps = {steps}: expected 1 to 4"):
        extend_schedule(make_plan(), steps)


@settings(max_examples=examples(60))
@given(
    steps=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    template=st.sampled_from(["flush", "continuous"]),
    pp=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_what_remains_after_a_checkpoint_is_a_valid_schedule(steps, template, pp, data):
    plan = _with_steps(make_plan(template=template, pp=pp), steps)
    if data.draw(st.booleans()):
        plan = _by_hand(plan)
    iterations = data.draw(st.integers(1, max(steps)))
    first = data.draw(st.integers(0, iterations - 1))
    m = plan.microbatches
    whole = extend_schedule(plan, iterations)
    rest = extend_schedule(plan, iterations, first=first)
    check_schedule(whole, m)
    check_schedule(  # numbered from 0 again, it is a schedule like any other
        [[Action(a.kind, a.htask, a.number - first * (1 if a.kind == "STEP" else m[a.htask])) for a in stage]
         for stage in rest],
        m,
    )  # fmt: skip
    for stage in range(pp):
        assert [a for a in whole[stage] if a in set(rest[stage])] == rest[stage]
    wanted = sum(max(0, own - first) for own in plan.htask_steps(iterations))
    assert sum(a.kind == "STEP" for a in rest[0]) == wanted


def test_a_step_away_from_its_last_backward_is_refused_if_all_stages_must_meet_there():
    stage = [*map(Action.parse, "F0.0 B0.0 F1.0 B1.0 STEP0.0 STEP1.0".split())]
    check_step_meetings([stage, stage], [], "plan")
    with pytest.raises(SpecError, match=r"plan: derived\.schedule\[0\]\[4\] = 'STEP0.0': expected a place"):
        check_step_meetings([stage, stage], [0], "plan")


@pytest.mark.parametrize("template", ["flush", "continuous", "gpipe", "lorapp"])
@pytest.mark.parametrize("mode", ["sequential", "interleaved"])
def test_generated_schedules_step_where_all_stages_can_meet(template, mode):
    plan = make_plan(template=template, pp=4, orchestration=Orchestration(mode=mode))
    stages = extend_schedule(plan, 4)
    check_step_meetings(stages, [0, 1], "plan")
    assert stages == build_schedule(
        plan.buckets, (2, 2), pp=4, template=template, steps=[4, 4], co_scheduled=mode == "interleaved"
    )


def test_stages_that_meet_after_different_backwards_are_refused():
    """Stage 0 would wait for B1.0 of stage 1, which would wait in STEP0.0 for stage 0."""
    early = [*map(Action.parse, "F0.0 F1.0 B0.0 STEP0.0 B1.0 STEP1.0".split())]
    late = [*map(Action.parse, "F0.0 F1.0 B0.0 B1.0 STEP0.0 STEP1.0".split())]
    check_step_meetings([late, late], [0, 1], "plan")
    with pytest.raises(SpecError, match=r"plan: derived\.schedule\[1\]\[3\] = 'STEP0.0': expected a place"):
        check_step_meetings([late, early], [0], "plan")


def test_stages_that_step_in_different_orders_are_refused():
    """They tell each other in that order whether a step is sound."""
    first = [*map(Action.parse, "F0.0 F1.0 B0.0 B1.0 STEP0.0 STEP1.0".split())]
    other = [*first[:4], *first[:3:-1]]
    with pytest.raises(
        SpecError, match=r"plan: derived\.schedule\[1\]\[4\] = 'STEP1\.0': expected STEP0\.0, as stages"
    ):
        check_step_meetings([first, other], [], "plan")
