"""What a command refuses of a backbone's weights before it plans."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from muxtune.api.inputs import load_inputs
from muxtune.support.errors import SpecError
from tests.helpers import make_hf_model, make_task, write_examples


@pytest.fixture
def workload(tmp_path) -> Path:
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0))
    content = {"tasks": [task.model_dump(mode="json", exclude_none=True)]}
    (tmp_path / "workload.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "workload.yaml"


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_hf_model(tmp_path / "model", "llama")


def _pickle(folder: Path, **more: torch.Tensor) -> None:
    torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_whole_weights_of_either_kind_are_planned_in_silence(workload, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = load_inputs(workload, str(folder), "cpu-2")
        _pickle(folder)
        assert load_inputs(workload, str(folder), "cpu-2").model == stored.model


def test_pickled_weights_that_nothing_uses_are_refused_by_name(workload, folder):
    _pickle(folder, **{"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)})
    with pytest.raises(
        SpecError, match=r"found model\.layers\.0\.self_attn\.q_proj\.weight_scale \(quantized"
    ):
        load_inputs(workload, str(folder), "cpu-2")


def test_a_folder_without_weights_is_planned_and_that_is_said(workload, folder):
    (folder / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=f"^{folder} has no weights: it can be planned, not run$"):
        load_inputs(workload, str(folder), "cpu-2")
