"""Runs whose difference to the plan has a known cause."""

from __future__ import annotations

import random

import pytest

from muxtune.plan import Plan, stage_times
from muxtune.schedule import iteration_ends_s
from muxtune.validation import IterationExplanation, explain_difference, read_run
from muxtune.validation.replay import iteration_ends_s as replayed_ends_s
from muxtune.validation.replay import replay, stages_meet
from tests.muxtune.validation.runs import STEADY, Reality, make_trace
from tests.plans import changed, make_plan

TEMPLATES = ("continuous", "flush")


def explain(plan: Plan, reality: Reality) -> IterationExplanation:
    spans = make_trace(plan, reality)
    ends_s = iteration_ends_s(spans)
    lengths_s = sorted(ends_s[k] - ends_s[k - 1] for k in STEADY)
    run = read_run(plan, spans, STEADY)
    return explain_difference(run, predicted_s=plan.predicted.iteration_s, measured_s=lengths_s[1])


def parts_of(explanation: IterationExplanation) -> dict[tuple[str, int | None], float]:
    return {(part.cause, part.stage): part.seconds for part in explanation.parts}


def assert_only(explanation: IterationExplanation, *causes: tuple[str, int | None]) -> None:
    """All of the difference lies in these causes; the plan's own window may differ a little."""
    parts = parts_of(explanation)
    assert sum(parts.values()) == pytest.approx(explanation.difference_s, abs=1e-12)
    for cause, seconds in parts.items():
        if cause not in causes:
            assert seconds == pytest.approx(0, abs=1e-9), cause
    assert abs(explanation.difference_s) > 1e-4
    assert (explanation.parts[0].cause, explanation.parts[0].stage) in causes


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_is_explained_where_a_run_is_as_predicted(template):
    explanation = explain(make_plan(template=template), Reality())
    assert explanation.difference_s == pytest.approx(0, abs=1e-9)
    assert max(abs(part.seconds) for part in explanation.parts) < 1e-9


@pytest.mark.parametrize("template", TEMPLATES)
def test_slower_backwards_of_one_stage_are_found(template):
    plan = make_plan(template=template)

    def tenth(stage, action):
        return 0.1 * plan.predicted.bwd_s[1][action.htask] if (stage, action.kind) == (1, "B") else 0.0

    explanation = explain(plan, Reality(work_s=tenth))
    assert_only(explanation, ("B", 1))
    assert "backwards of stage 1" in explanation.parts[0].meaning
    assert "+10.0 % to the predicted" in explanation.parts[0].meaning


@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_what_all_forwards_and_backwards_have_in_common_is_the_device_s(factor):
    plan = make_plan()
    times = stage_times(plan)

    def other(stage, action):
        """Backwards of stage 1 take twice that, or half."""
        own = (2.0 if factor > 1 else 0.5) if (stage, action.kind) == (1, "B") else 1.0
        return (own * factor - 1) * times.duration_s(stage, action)

    explanation = explain(plan, Reality(work_s=other))
    assert_only(explanation, ("device", None), ("B", 1))
    parts = parts_of(explanation)
    assert parts["device", None] == pytest.approx((factor - 1) * plan.predicted.iteration_s, rel=0.2)
    assert parts["B", 1] * (factor - 1) > 0
    assert any(f"take {factor:.2f} times the predicted" in part.meaning for part in explanation.parts)


def test_what_two_stages_share_is_divided_between_them():
    plan = make_plan()  # equal stages: a single slower one would be as bad as both
    explanation = explain(plan, Reality(work_s=lambda stage, action: 2e-3 if action.kind == "F" else 0.0))
    assert_only(explanation, ("F", 0), ("F", 1))
    parts = parts_of(explanation)
    assert parts["F", 0] == pytest.approx(parts["F", 1], rel=0.3)


@pytest.mark.parametrize("template", TEMPLATES)
def test_optimizer_steps_that_were_not_predicted_are_found(template):
    reality = Reality(work_s=lambda stage, action: 3e-3 if action.kind == "STEP" else 0.0)
    explanation = explain(make_plan(template=template), reality)
    assert_only(explanation, ("STEP", 0), ("STEP", 1))
    assert "optimizer steps of stage 0 take 6.0 ms" in " ".join(part.meaning for part in explanation.parts)
    assert "nothing was predicted" in explanation.parts[0].meaning


def test_optimizer_steps_that_the_backwards_carried_explain_nothing_but_their_place():
    """Two micro-batches a step: the backward is 2 ms shorter than predicted, the step takes the 4 ms."""
    reality = Reality(work_s=lambda stage, action: {"F": 0.0, "B": -2e-3, "STEP": 4e-3}[action.kind])
    explanation = explain(make_plan(), reality)
    parts = parts_of(explanation)
    assert max(abs(parts["B", stage]) for stage in (0, 1)) < 1e-9
    assert abs(explanation.difference_s) < 2e-3  # the same work in another place
    assert sum(parts.values()) == pytest.approx(explanation.difference_s, abs=1e-12)


def test_slow_messages_are_found():
    explanation = explain(make_plan(template="flush"), Reality(transfer_s=lambda stage, action: 4e-3))
    assert_only(explanation, ("messages", None))


def test_time_between_actions_is_found():
    explanation = explain(make_plan(), Reality(pause_s=lambda stage, action: 5e-4))
    assert_only(explanation, ("between", None))


def test_computing_before_the_tensor_is_there_belongs_to_the_forward():
    explanation = explain(make_plan(template="flush"), Reality(feed_s=1e-3))
    assert_only(explanation, ("F", 1))
    assert explanation.difference_s < 0  # it runs while stage 1 waits


def test_stages_that_meet_at_steps_are_found():
    plan = make_plan()
    tasks = tuple(task.model_copy(update={"max_grad_norm": 1.0}) for task in plan.tasks)
    plan = changed(plan, tasks=tasks)
    explanation = explain(plan, Reality(meeting=lambda action: True))
    assert_only(explanation, ("exchange", None))


def test_a_pause_in_one_iteration_is_not_the_median_iteration_s_difference():
    reality = Reality(pause_s=lambda stage, action: 0.05 if str(action) == "F0.5" and stage == 0 else 0.0)
    explanation = explain(make_plan(template="flush"), reality)
    assert explanation.difference_s == pytest.approx(0, abs=1e-9)


def test_uneven_actions_are_found_as_variation():
    """Forwards of stage 0 are slow in two of three steady iterations, but only the first micro-batch."""

    def slow_first(stage, action):
        return 8e-3 if action.kind == "F" and stage == 0 and action.number in (2, 4) else 0.0

    explanation = explain(make_plan(template="flush"), Reality(work_s=slow_first))
    assert_only(explanation, ("variation", None))
    assert explanation.difference_s == pytest.approx(16e-3, rel=0.5)


def messy(seed: int) -> Reality:
    """Everything differs at random, but the same in every call."""

    def noise(scale_s):
        def seconds(stage, action):
            return scale_s * random.Random(f"{seed} {scale_s} {stage} {action}").random()

        return seconds

    return Reality(work_s=noise(6e-3), transfer_s=noise(5e-3), pause_s=noise(1e-3), feed_s=5e-4, call_s=2e-4)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_parts_add_up_and_measured_timings_replay_the_run_whatever_happens(template, pp):
    plan = make_plan(template=template, pp=pp)
    for seed in range(3):
        spans = make_trace(plan, messy(seed))
        run = read_run(plan, spans, STEADY)
        played = replay(run.stages, lambda s, i, run=run: run.timings[s][i], lambda c: stages_meet(plan, c))
        ends_s = list(replayed_ends_s(run.stages, played).values())
        assert ends_s == pytest.approx(iteration_ends_s(spans), rel=1e-12)
        explanation = explain(plan, messy(seed))
        assert explanation == explain(plan, messy(seed))
        parts = parts_of(explanation)
        assert sum(parts.values()) == pytest.approx(explanation.difference_s, abs=1e-12)
        assert abs(parts["rest", None]) < 0.2 * explanation.difference_s
        sizes = [abs(part.seconds) for part in explanation.parts]
        assert sizes == sorted(sizes, reverse=True)
