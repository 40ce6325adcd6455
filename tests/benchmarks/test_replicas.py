"""Pairs of plans that ``python -m benchmarks.replicas`` executes, and how it reads them."""

from __future__ import annotations

import pytest

from benchmarks.helpers.fusion_instances import cpu_costs
from benchmarks.replicas import CASES, Pair, plan_pair, row
from muxtune.model import PRESETS

MODEL = PRESETS["llama-tiny"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("replicas")
    return {
        name: plan_pair(name, lengths, MODEL, cpu_costs(MODEL), folder, steps=3)
        for name, lengths in CASES.items()
    }


def test_plans_differ_in_replicas_alone(pairs):
    for pair in pairs.values():
        one, two = pair.one, pair.two
        assert (one.parallelism.dp, two.parallelism.dp) == (1, 2)
        assert one.parallelism.layers_per_stage == two.parallelism.layers_per_stage == (MODEL.layers,)
        assert one.tasks == two.tasks
        assert one.predicted.effective_tokens_per_s * one.predicted.iteration_s == pytest.approx(
            two.predicted.effective_tokens_per_s * two.predicted.iteration_s
        )


def test_a_second_replica_helps_where_it_has_something_to_do(pairs):
    assert 1 < pairs["one sequence"].predicted < 1.05
    assert 0.45 < pairs["alike"].predicted < 0.6
    assert pairs["one is long"].predicted < 1


def test_a_row_says_whether_prediction_and_measurement_are_on_one_side(pairs):
    pair = pairs["one sequence"]
    assert row(pair, 1.0, 1.3, 1.2)[-4:] == ["1.20x", f"{pair.predicted:.3f}x", "1.300x", "yes"]
    assert row(pair, 1.0, 0.7, 1.2)[-2:] == ["0.700x", "no"]
