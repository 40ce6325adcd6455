"""Bounds are relative to how far peft is from itself, and say so where that allows anything."""

from __future__ import annotations

import math

import pytest

from muxtune.model import PRESETS
from muxtune.peft.bottleneck import BottleneckSpec
from muxtune.peft.lora import LoraSpec
from runtime.reports.spread import (
    CEILING,
    FLOORS,
    RELU_FLOOR,
    STRICT,
    TIMES,
    Distance,
    bound_of,
    judge,
    largest,
    needs_spread,
)

LLAMA, OPT = PRESETS["llama-tiny"], PRESETS["opt-tiny"]
EXACT = LLAMA.model_copy(update={"dtype": "float64"})
LORA = LoraSpec(method="lora", r=4, alpha=8, targets=("q_proj",))
NAN, INF = float("nan"), float("inf")


def bottleneck(activation):
    return BottleneckSpec(method="bottleneck", size=4, activation=activation)


def test_float64_needs_no_second_run_and_is_strict():
    assert not needs_spread(EXACT)
    assert bound_of(EXACT, LORA, None) == STRICT == Distance(1e-9, 1e-9)
    assert judge(Distance(1e-10, 2e-9), STRICT) == "beyond"


@pytest.mark.parametrize(
    ("model", "peft", "floor"),
    [
        (LLAMA, LORA, FLOORS["float32"]),
        (OPT, LORA, RELU_FLOOR),
        (LLAMA, bottleneck("gelu"), FLOORS["float32"]),
        (LLAMA, bottleneck("relu"), RELU_FLOOR),
        (LLAMA.model_copy(update={"dtype": "bfloat16"}), bottleneck("relu"), FLOORS["bfloat16"]),
    ],
    ids=["silu", "relu", "gelu bottleneck", "relu bottleneck", "relu bottleneck in bfloat16"],
)
def test_a_peft_that_meets_itself_leaves_the_stated_floor(model, peft, floor):
    assert needs_spread(model)
    assert bound_of(model, peft, Distance(0.0, 0.0)) == floor


def test_a_kink_changes_nothing_in_float64():
    assert bound_of(EXACT, bottleneck("relu"), None) == STRICT


def test_the_bound_is_twice_the_spread_where_that_is_more():
    """The numbers of a real pretrained model: 6.5e-3 beside peft's own 1.0e-2."""
    bound = bound_of(LLAMA, LORA, Distance(3e-5, 1.0e-2))
    assert bound == Distance(TIMES * 3e-5, TIMES * 1.0e-2)
    assert judge(Distance(2e-5, 6.5e-3), bound) == "within"
    assert judge(Distance(2e-5, 2.1e-2), bound) == "beyond"
    assert judge(Distance(7e-5, 6.5e-3), bound) == "beyond"


@pytest.mark.parametrize(
    "spread", [(NAN, 1e-3), (1e-6, NAN), (INF, 1e-3), (1e-6, INF), (1e-6, 0.3), (0.03, 1e-3)]
)
def test_a_spread_that_is_huge_or_no_number_decides_nothing(spread):
    bound = bound_of(LLAMA, LORA, Distance(*spread))
    assert judge(Distance(0.0, 0.0), bound) == "undecided"


@pytest.mark.parametrize("found", [(NAN, 1e-6), (1e-9, NAN), (INF, INF)])
def test_a_difference_that_is_no_number_is_beyond(found):
    assert judge(Distance(*found), bound_of(LLAMA, LORA, Distance(1e-7, 1e-5))) == "beyond"


def test_without_all_steps_the_losses_decide_alone():
    bound = bound_of(LLAMA, LORA, Distance(1e-7, None))
    assert bound.update is None
    assert judge(Distance(5e-6, None), bound) == "within"
    assert judge(Distance(5e-5, None), bound) == "beyond"


def test_every_floor_is_far_below_the_ceiling():
    for floor in (*FLOORS.values(), RELU_FLOOR):
        assert floor.loss <= CEILING.loss / 10
        assert floor.update <= CEILING.update / 5
        assert not math.isnan(floor.loss)


def test_the_largest_of_several_draws_counts_in_each_part_and_a_nan_is_larger():
    draws = [Distance(1e-5, 2e-3), Distance(3e-5, 1e-3), Distance(2e-5, 1.7e-4)]
    assert largest(draws) == Distance(3e-5, 2e-3)
    assert largest([Distance(1e-5, None)]) == Distance(1e-5, None)
    assert math.isnan(largest([Distance(NAN, 1e-3), Distance(1e-5, 1e-3)]).loss)
    assert math.isnan(largest([Distance(1e-5, 1e-3), Distance(1e-5, NAN)]).update)
