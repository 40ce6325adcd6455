"""Weights read or drawn tensor by tensor are those of the whole model, and take less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from muxtune.model import load_model_spec
from muxtune.support.errors import SpecError
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.backbone.weights import DrawnWeights, StoredWeights, open_weights
from runtime.distributed.sharding import Shard
from tests.helpers import TINY_PRESETS, make_hf_model
from tests.runtime.worlds import BACKBONES

FILE = "model.safetensors"


def _assert_equal(weights, spec):
    whole = load_hf_model(spec)
    names = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
    assert "lm_head.weight" in names
    for name in names:
        expected, found = whole.get_parameter(name), weights.get_parameter(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_a_preset_is_drawn_as_transformers_draws_it(preset, dtype):
    spec = load_model_spec(preset, dtype)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    weights = open_weights(spec)
    assert isinstance(weights, DrawnWeights)
    _assert_equal(weights, spec)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", BACKBONES)
def test_biases_and_tied_heads_are_drawn_too_in_any_order_and_again(family):
    spec = BACKBONES[family].model_copy(update={"init_seed": 5})
    weights, whole = open_weights(spec), load_hf_model(spec)
    names = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
    for name in [*reversed(names), *names[:3]]:
        assert torch.equal(weights.get_parameter(name), whole.get_parameter(name)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second has tied embeddings
def test_a_directory_is_read_as_transformers_reads_it(family, dtype, tmp_path):
    spec = load_model_spec(str(make_hf_model(tmp_path, family)), dtype)
    weights = open_weights(spec)
    assert isinstance(weights, StoredWeights)
    _assert_equal(weights, spec)


def test_a_directory_of_several_files(tmp_path):
    spec = load_model_spec(str(make_hf_model(tmp_path, "llama")))
    _split(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert isinstance(open_weights(spec), StoredWeights)
    _assert_equal(open_weights(spec), spec)


def test_a_directory_of_a_model_without_its_head(tmp_path):
    """Names without the prefix; the head is tied to an embedding that is there."""
    spec = load_model_spec(str(make_hf_model(tmp_path, "gpt2")))
    tensors = load_file(tmp_path / FILE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / FILE, metadata={"format": "pt"})
    assert isinstance(open_weights(spec), StoredWeights)
    _assert_equal(open_weights(spec), spec)


def test_a_head_that_is_stored_although_tied_counts_as_it_does_for_transformers(tmp_path):
    spec = load_model_spec(str(make_hf_model(tmp_path, "gpt2")))
    tensors = load_file(tmp_path / FILE)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1.0
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    _assert_equal(open_weights(spec), spec)


def test_a_directory_of_another_format_is_loaded_whole_and_the_log_says_so(tmp_path, caplog):
    spec = load_model_spec(str(make_hf_model(tmp_path, "llama")))
    torch.save(load_file(tmp_path / FILE), tmp_path / "pytorch_model.bin")
    (tmp_path / FILE).unlink()
    weights = open_weights(spec)
    assert isinstance(weights, torch.nn.Module)
    _assert_equal(weights, spec)
    assert "neither model.safetensors nor a readable model.safetensors.index.json" in caplog.text
    assert "every rank loads the whole backbone" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, r"q_proj\.bias \(attention_bias is false"),
        ({"model.norm.weight": None}, r"missing model\.norm\.weight"),
    ],
    ids=["unused", "missing"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_that_are_not_the_models_are_refused_by_name(zipped, change, message, tmp_path):
    spec = load_model_spec(str(make_hf_model(tmp_path, "llama")))
    tensors = {k: v for k, v in (load_file(tmp_path / FILE) | change).items() if v is not None}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / FILE).unlink()
    with pytest.raises(SpecError, match=rf"model\.source = .*{message}"):
        open_weights(spec)


@pytest.mark.parametrize("damage", ["missing", "shape", "cut", "index"])
def test_what_transformers_refuses_is_refused_with_its_reason(damage, tmp_path):
    spec = load_model_spec(str(make_hf_model(tmp_path, "llama")))
    tensors = load_file(tmp_path / FILE)
    name = "model.layers.3.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
        save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    elif damage == "cut":
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    else:
        _split(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SpecError, match=r"model\.source = "):
        open_weights(spec)


def _split(folder: Path) -> None:
    """One file into two with an index, as ``save_pretrained`` does with large models."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    places = {}
    for part, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("family", BACKBONES)
def test_a_stage_and_its_copies_are_those_of_the_whole_model(family):
    spec = BACKBONES[family]
    whole = load_hf_model(spec)
    shard = Shard(0, 2) if family == "llama" else Shard()
    place = {"layers": range(2, 4), "first": False, "last": True, "shard": shard}
    expected = Stage(spec, weights=whole, **place).state_dict()
    stage = Stage(spec, weights=open_weights(spec), **place)
    for each in (stage, stage.copy()):
        state = each.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    addresses = {p.data_ptr() for p in stage.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in stage.copy().parameters())


MEASURE = """
import sys
from muxtune.model import load_model_spec
from runtime.backbone.stage import Stage
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.held_bytes import parameter_bytes
from runtime.device.process_memory import process_bytes, process_peak_bytes
from runtime.backbone.weights import open_weights

stored = load_model_spec(sys.argv[1])
preset = load_model_spec("llama-tiny").model_copy(update=dict(hidden=512, ffn=2048, layers=8, head_dim=64))
open_weights(load_model_spec("llama-tiny"))  # imports

def build(spec, weights):
    return Stage(spec, range(4, 6), first=False, last=False, weights=weights)

start = process_bytes()
for spec in (stored, preset):
    stage = build(spec, open_weights(spec))
own = process_peak_bytes() - start
whole = load_hf_model(preset)
stage = build(preset, whole)
print(parameter_bytes(stage), own, process_peak_bytes() - start)
"""
"""Prints bytes of a stage's weights, of the peak while two are built, and of the peak with a whole model."""


def test_while_it_loads_a_rank_holds_its_stage_and_a_tensor(tmp_path):
    _save_llama(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, own, whole = map(int, done.stdout.split())
    # One stage is built while the one before is still there; beside them the largest tensors, of 4 MiB, the
    # parts of a linear side by side, and what the process itself allocates.
    assert own < 2 * weights + 32 * 2**20
    assert whole > 2 * weights + 96 * 2**20


def _save_llama(folder: Path) -> None:
    """Of the same size as the preset, in another dtype than it is loaded in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
