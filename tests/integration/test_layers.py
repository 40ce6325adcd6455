"""Tasks that adapt some layers alone: losses and adapters are those of peft with ``layers_to_transform``.

On two stages with two ranks each: one task has nothing on the first stage, one nothing on the second, and one
of them is clipped by the norm of its whole gradient.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from muxtune.plan import Plan
from tests.integration.parity import ParityBench, read_adapter
from tests.integration.test_chunks import LLAMA
from tests.integration.test_chunks import TASKS as EVERYWHERE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

LAYERS = {"long": [3], "down": [0, 1], "alone": [1, 3]}
LINEARS = {"long": ["q_proj", "v_proj", "o_proj", "down_proj"]}  # peft takes no all-linear of some layers
TASKS = {
    name: fields
    | {
        "peft": fields["peft"]
        | ({"layers": LAYERS[name]} if name in LAYERS else {})
        | ({"targets": LINEARS[name]} if name in LINEARS else {}),
        "steps": 4,
        "max_grad_norm": 0.05 if name == "long" else None,
    }
    for name, fields in EVERYWHERE.items()
}
CASE = replace(LLAMA, tp=2, pp=2)


@pytest.fixture(scope="module")
def layers_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("layers"), TASKS)


@pytest.fixture
def bench(layers_bench, quick_ranks) -> ParityBench:
    return layers_bench


@pytest.fixture
def run(bench) -> tuple[Plan, Path]:
    return bench.plan(CASE), bench.run(CASE)


def test_losses_and_adapters_equal_those_of_peft_on_the_same_layers(bench):
    bench.assert_same(bench.compare(CASE), CASE)


def test_adapters_have_the_tensors_of_these_layers_alone(run):
    _, run_dir = run
    for task_id, layers in LAYERS.items():
        found = {int(key.split(".layers.")[1].split(".")[0]) for key in read_adapter(run_dir, task_id)}
        assert found == set(layers), task_id
