"""Dropout beside tasks without it: losses and adapters are those of peft alone with the same masks.

One run with all that could change a mask: chunks that are carried over micro-batches, shards of linears,
stages of layers. The rest is tested cheaper, in ``tests/runtime/backbone/test_stage_dropout.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from muxtune.plan import Plan
from runtime import validate_run
from tests.integration.differences import STRICT
from tests.integration.parity import ParityBench
from tests.integration.test_chunks import LLAMA
from tests.integration.test_chunks import TASKS as WITHOUT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

RATES = {"long": 0.1, "down": 0.5, "text": 0.0, "alone": 0.3}
TASKS = {
    name: WITHOUT[name] | {"peft": WITHOUT[name]["peft"] | {"dropout": rate}, "steps": 4}
    for name, rate in RATES.items()
}
CASE = replace(LLAMA, carry=2, tp=2, pp=2, template="flush")


@pytest.fixture(scope="module")
def dropout_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("dropout"), TASKS)


@pytest.fixture
def bench(dropout_bench, quick_ranks) -> ParityBench:
    return dropout_bench


@pytest.fixture
def run(bench) -> tuple[Plan, Path]:
    return bench.plan(CASE), bench.run(CASE)


def test_losses_and_adapters_equal_those_of_peft_with_the_same_masks(bench):
    bench.assert_same(bench.compare(CASE), CASE)


def test_validation_trains_the_tasks_alone_with_the_same_masks(run):
    """In padded batches of the declared size."""
    report = validate_run(*run)
    assert report.max_loss_difference < STRICT.loss
    assert all(task.adapter_error < STRICT.update for task in report.tasks)


def test_saved_adapters_say_their_dropout(run):
    _, run_dir = run
    for task_id, rate in RATES.items():
        config = json.loads((run_dir / "tasks" / task_id / "adapter" / "adapter_config.json").read_text())
        assert config["lora_dropout"] == rate
