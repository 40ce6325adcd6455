"""Stages of layers to which tasks attach different things, priced and measured."""

from __future__ import annotations

import pytest

from muxtune.costs.compose import step_seconds
from muxtune.memory import kept_bytes
from muxtune.peft import first_trained, stage_layers, stages_layers
from muxtune.peft.lora import LoraSpec
from tests.muxtune.costs.actions import stage_seconds
from tests.muxtune.graph.works import LLAMA, Rates, work


def lora(*layers: int) -> LoraSpec:
    return LoraSpec(method="lora", r=8, alpha=16, targets=("q_proj", "down_proj"), layers=layers or None)


def test_layers_that_are_alike_are_one_run():
    pefts = (lora(), lora(0, 1, 4))
    assert stage_layers(LLAMA, pefts, 0, LLAMA.layers) == ((0, 2), (2, 2), (0, 1), (2, 3))
    assert stages_layers(LLAMA, pefts, (3, 5)) == [((0, 2), (2, 1)), ((2, 1), (0, 1), (2, 3))]
    assert stage_layers(LLAMA, (lora(), lora()), 2, 6) == ((0, 4),)


def test_a_layer_without_adapters_costs_less_and_before_the_first_one_there_is_no_backward():
    costs = Rates(LLAMA)
    seconds = {}
    for layers in ((), (7,), (0,)):
        micro = work(lora(*layers), tokens=100)
        runs = stage_layers(LLAMA, micro.pefts, 0, LLAMA.layers)
        for phase in ("fwd", "bwd"):
            seconds[layers, phase] = stage_seconds(
                costs, LLAMA, runs, first=True, last=True, work=micro, phase=phase
            )
    assert seconds[(7,), "fwd"] == pytest.approx(seconds[(0,), "fwd"])
    assert seconds[(), "fwd"] > seconds[(0,), "fwd"]
    assert seconds[(7,), "bwd"] < 0.5 * seconds[(0,), "bwd"] < 0.5 * seconds[(), "bwd"]


def test_what_is_kept_begins_with_the_first_trained_thing():
    kept = {}
    for layers in ((), (7,), (0,)):
        micro = work(lora(*layers), tokens=100)
        runs = stage_layers(LLAMA, micro.pefts, 0, LLAMA.layers)
        kept[layers] = kept_bytes(LLAMA, runs, first=True, last=False, work=micro).activation_bytes
    assert kept[(7,)] < kept[(0,)] / 4 < kept[()] / 4


def test_a_stage_without_a_tensor_of_a_task_has_no_step():
    first, second = stages_layers(LLAMA, (lora(7),), (4, 4))
    assert step_seconds(Rates(LLAMA), LLAMA, first, lora(7)) == 0
    assert step_seconds(Rates(LLAMA), LLAMA, second, lora(7)) > 0
    assert first_trained(LLAMA, (lora(7),), first) is None
