"""Backbones and workloads that benchmarks on sizes share."""

from __future__ import annotations

import pytest

from benchmarks.helpers.backbones import llama_of_width, many_mixed_tasks
from experiments.workloads import mixed_workload
from muxtune.model import load_model_spec


@pytest.mark.parametrize("hidden", [8, 128, 512, 1024])
def test_heads_divide_the_width_and_share_keys(hidden):
    model = llama_of_width(hidden, 3)
    assert model.heads * model.head_dim == hidden
    assert model.heads == 2 * model.kv_heads
    assert model.head_dim % 2 == 0  # rotary positions turn pairs


def test_the_width_of_the_preset_gives_the_preset_s_mlp():
    assert llama_of_width(256, 8).ffn == load_model_spec("llama-tiny").ffn


def test_copies_of_the_mixed_tasks_differ_in_id_and_seed_and_have_smaller_batches():
    workload = many_mixed_tasks(2, steps=3, batches_divided_by=8)
    assert len({task.id for task in workload.tasks}) == 16
    assert len({task.seed for task in workload.tasks}) == 16
    for task, original in zip(workload.tasks, mixed_workload(3).tasks * 2, strict=True):
        assert task.peft == original.peft
        assert task.global_batch_size == max(1, original.global_batch_size // 8)
        assert task.global_batch_size % task.micro_batch_size == 0
