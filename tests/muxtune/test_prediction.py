from __future__ import annotations

import pytest

from muxtune.prediction import IterationTokens, iteration_tokens, predict
from muxtune.schedule import build_schedule
from muxtune.timeline import StageTimes, evaluate_schedule
from tests.plans import make_plan

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


def test_tokens_of_a_plan_are_counted_per_iteration():
    tokens = iteration_tokens(make_plan())
    assert tokens.all == 2 * 512 + 2 * 512
    assert tokens.billed == 8 * 64 + 8 * 64 + 8 * 128
    assert tokens.effective == pytest.approx(900)
