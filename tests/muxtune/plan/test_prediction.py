from __future__ import annotations

import pytest

from muxtune.plan import (
    IterationTokens,
    Orchestration,
    iteration_tokens,
    predict,
    predict_plan,
    stage_times,
    theoretical_bubble_fraction,
)
from muxtune.schedule import StageTimes, build_schedule, evaluate_schedule
from tests.plans import changed, make_plan

TOKENS = IterationTokens(all=1000, billed=800, effective=500)


def predict_uniform(*, pp: int, microbatches: int, template: str, iterations: int):
    """Every forward takes 1 s, every backward 2 s, transfers nothing."""
    stages = build_schedule([[0]], [microbatches], pp=pp, template=template, steps=[iterations])
    times = StageTimes(fwd_s=[[1.0]] * pp, bwd_s=[[2.0]] * pp, p2p_s=[0.0])
    return predict(
        evaluate_schedule(stages, times),
        times=times,
        microbatches=[microbatches],
        tokens=TOKENS,
        peak_memory_bytes=[7] * pp,
    )


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_flush_is_the_textbook_1f1b(pp, microbatches):
    predicted = predict_uniform(pp=pp, microbatches=microbatches, template="flush", iterations=1)
    assert predicted.iteration_s == pytest.approx((microbatches + pp - 1) * 3)
    assert predicted.makespan_s == predicted.iteration_s
    assert predicted.bubble_fraction == pytest.approx((pp - 1) / (microbatches + pp - 1))
    assert predicted.lower_bound_s == pytest.approx(microbatches * 3)


def test_tokens_per_second_are_of_a_steady_iteration():
    predicted = predict_uniform(pp=2, microbatches=4, template="flush", iterations=3)
    assert predicted.scheduled_iterations == 3
    assert predicted.iteration_s == pytest.approx(15)
    assert predicted.makespan_s == pytest.approx(45)
    assert predicted.tokens_per_s == pytest.approx(1000 / 15)
    assert predicted.billed_tokens_per_s == pytest.approx(800 / 15)
    assert predicted.effective_tokens_per_s == pytest.approx(500 / 15)


@pytest.mark.parametrize("pp", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("template", ["flush", "gpipe"])
def test_equal_clocks_have_the_theoretical_bubble(pp, microbatches, template):
    predicted = predict_uniform(pp=pp, microbatches=microbatches, template=template, iterations=1)
    expected = theoretical_bubble_fraction([[0]], [microbatches], pp=pp, template=template)
    assert expected == pytest.approx((pp - 1) / (microbatches + pp - 1))
    assert predicted.bubble_fraction == pytest.approx(expected)


@pytest.mark.parametrize("template", ["flush", "continuous"])
@pytest.mark.parametrize("instances", [[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 0]])
def test_every_turn_of_an_instance_fills_and_drains(template, instances):
    buckets, microbatches, pp = [[h] for h in range(4)], [3] * 4, 3
    stages = build_schedule(
        buckets, microbatches, pp=pp, template=template, steps=[5] * 4, instances=instances
    )
    times = StageTimes(fwd_s=[[1.0] * 4] * pp, bwd_s=[[2.0] * 4] * pp, p2p_s=[0.0] * 4)
    predicted = predict(
        evaluate_schedule(stages, times),
        times=times,
        microbatches=microbatches,
        tokens=TOKENS,
        peak_memory_bytes=[7] * pp,
    )
    expected = theoretical_bubble_fraction(
        buckets, microbatches, pp=pp, template=template, instances=instances
    )
    assert predicted.bubble_fraction == pytest.approx(expected)


def test_continuous_has_no_bubble_in_theory_and_shared_clocks_count_once():
    assert theoretical_bubble_fraction([[0], [1]], [2, 2], pp=4, template="continuous") == 0
    assert theoretical_bubble_fraction([[0, 1]], [2, 1], pp=3, template="flush") == 2 / 5
    shared = theoretical_bubble_fraction([[0, 1]], [2, 1], pp=3, template="flush", co_scheduled=True)
    assert shared == 2 / 4


def test_a_plan_is_predicted_again_with_shared_clocks():
    plan = make_plan(template="flush", orchestration=Orchestration(mode="interleaved"))
    times = stage_times(plan)
    again = predict_plan(plan, evaluate_schedule(plan.actions, times))
    assert again.iteration_s == pytest.approx(plan.predicted.iteration_s)
    assert again.clock_s == plan.predicted.clock_s
    # Two clocks of 18 and 35 ms on two stages; the first waits for a transfer of both hTasks each way.
    assert again.iteration_s == pytest.approx(3 * (0.018 + 0.035) + 2 * 0.002)
    assert again.lower_bound_s == pytest.approx(2 * (0.018 + 0.035))
    assert again.bubble_fraction == pytest.approx(1 - again.lower_bound_s / again.iteration_s)


def test_tokens_of_all_replicas_count():
    plan = make_plan()
    parallelism = plan.parallelism.model_copy(update={"dp": 2})
    replicated = changed(plan, parallelism=parallelism)
    assert iteration_tokens(replicated).all == 2 * iteration_tokens(plan).all


def test_tokens_of_replicas_without_a_sequence_do_not_count():
    """Eight sequences, padded, go to four micro-batches by two; the third replica has none."""
    plan = make_plan()
    parallelism = plan.parallelism.model_copy(update={"dp": 3})
    replicated = changed(plan, parallelism=parallelism)
    assert iteration_tokens(replicated).all == 2 * iteration_tokens(plan).all


def test_tokens_of_a_plan_are_counted_per_iteration():
    tokens = iteration_tokens(make_plan())
    assert tokens.all == 2 * 512 + 2 * 512
    assert tokens.billed == 8 * 64 + 8 * 64 + 8 * 128
    assert tokens.effective == pytest.approx(900)
