"""Counting of tasks that fit."""

from __future__ import annotations

import pytest

from experiments.memory_capacity import (
    PAPER,
    CapacitySetting,
    capacity,
    capacity_table,
    most_that_fit,
    placement_bytes,
    settings,
)

SETTING = CapacitySetting(
    model="gpt3-2.7b", tp=2, pp=1, dataset="OpenBookQA", length=128, micro_batch=4, logits="targets"
)


@pytest.mark.parametrize("limit", [0, 99, 100, 101, 777, 10_000, 10**9])
def test_one_more_would_not_fit(limit):
    fit = most_that_fit(lambda tasks: 50 + 50 * tasks, limit, most=500)
    assert fit == min(max((limit - 50) // 50, 0), 500)


def test_an_instance_costs_at_least_its_half_of_the_weights():
    half = 2.65e9 * 2 / 2  # parameters of GPT3-2.7B in two bytes, on two GPUs
    own = placement_bytes(SETTING, "turns", 5) - placement_bytes(SETTING, "turns", 4)
    assert half < own < 1.1 * half
    assert placement_bytes(SETTING, "processes", 4) == 4 * placement_bytes(SETTING, "turns", 1)


def test_a_task_on_the_shared_backbone_costs_its_adapter_and_moments_and_fused_its_activations_too():
    parameters = 32 * 16 * (2560 + 3 * 2560 // 2)  # by hand: half of c_attn's outputs on each GPU
    # The second task changes the gradients that are held at the fullest moment; the third does not.
    third = placement_bytes(SETTING, "shared", 4) - placement_bytes(SETTING, "shared", 3)
    assert third == pytest.approx(1.05 * 3 * 4 * parameters, rel=1e-6)
    assert placement_bytes(SETTING, "fused", 3) - placement_bytes(SETTING, "fused", 2) > 10 * third


@pytest.mark.parametrize("model", PAPER)
def test_sharing_always_fits_more_and_needs_less(model):
    for setting in settings(model):
        result = capacity(setting)
        fits = result.fits
        assert fits["processes"] <= fits["turns"] < fits["shared"]
        assert fits["processes"] < fits["fused"] <= fits["shared"]
        assert all(ratio > 1 for ratio in result.reduction.values())


def test_half_a_device_fits_fewer_and_the_table_shows_every_setting():
    whole, half = capacity(SETTING), capacity(SETTING, device_bytes=24 * 10**9)
    assert all(half.fits[each] < whole.fits[each] for each in whole.fits)
    lines = capacity_table([whole, half]).splitlines()
    assert len(lines) == 4
    assert "OpenBookQA (128)" in lines[2]
