"""Stored tensors that the configuration has no use for, and missing ones, are refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from muxtune.model import spec_from_hf
from muxtune.model.stored import locate_tensors, weight_files
from muxtune.support.errors import SpecError
from tests.muxtune.model.folders import CONFIGS, LLAMA, split_weights, tensors_of, write_config, write_weights

SHARED = Path(__file__).parents[4] / "shared" / "cases"


@pytest.fixture(params=CONFIGS)
def backbone(request, tmp_path):
    """A folder, its backbone and its tensors, which are not written yet."""
    folder = write_config(tmp_path / "model", CONFIGS[request.param])
    spec = spec_from_hf(folder)
    return folder, spec, tensors_of(spec)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_folder_without_weights_can_be_planned_but_not_located(backbone):
    folder, spec, _ = backbone
    assert weight_files(folder) == ()
    with pytest.raises(SpecError, match=r"expected a directory with weights \(model\.safetensors\)"):
        locate_tensors(spec)


def test_every_parameter_is_found_in_one_file_and_in_several(backbone):
    folder, _, tensors = backbone
    write_weights(folder, tensors)
    whole = locate_tensors(spec_from_hf(folder))
    (folder / "model.safetensors").unlink()
    split_weights(folder, tensors)
    split = locate_tensors(spec_from_hf(folder))
    assert {name: (each.name, each.shape) for name, each in whole.items()} == {
        name: (each.name, each.shape) for name, each in split.items()
    }
    assert {each.file.name for each in split.values()} == {"a.safetensors", "b.safetensors"}
    assert whole.keys() == tensors.keys() | {"lm_head.weight"}


def test_each_missing_tensor_is_named(backbone):
    folder, _, tensors = backbone
    for name in list(tensors)[:: len(tensors) // 5]:
        rest = {key: value for key, value in tensors.items() if key != name}
        write_weights(folder, rest)
        with pytest.raises(SpecError) as caught:
            spec_from_hf(folder)
        assert f"missing {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name", "hint"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.bias", r" \(attention_bias is false\)"),
        ("llama", "model.layers.1.self_attn.o_proj.bias", r" \(attention_bias is false\)"),
        ("llama", "model.layers.0.mlp.up_proj.bias", r" \(mlp_bias is false\)"),
        (
            "llama",
            "model.layers.0.mlp.up_proj.weight_scale",
            r" \(quantized weights are not executed\)",
        ),
        ("llama", "model.layers.0.mlp.up_proj.weight_scale_inv", r" \(quantized"),
        ("llama", "model.layers.0.mlp.up_proj.qweight", r" \(quantized"),
        ("llama", "model.layers.0.mlp.up_proj.weight.absmax", r" \(quantized"),
        ("llama", "model.layers.2.mlp.up_proj.weight", "$"),  # there are layers 0 and 1
        ("llama", "model.layers.0.self_attn.q_norm.weight", "$"),
        ("llama", "score.weight", "$"),
        ("llama", "model.model.norm.weight.extra", "$"),
        ("llama", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "$"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight", "$"),
        ("gpt2", "transformer.h.2.ln_1.weight", "$"),
        ("gpt2", "h.0.attn.bias.more", "$"),
        ("opt", "model.decoder.project_in.weight", "$"),
        ("opt", "model.decoder.layers.0.fc3.weight", "$"),
    ],
)
def test_each_tensor_that_nothing_uses_is_named(family, name, hint, tmp_path):
    folder = write_config(tmp_path, CONFIGS[family])
    write_weights(folder, tensors_of(spec_from_hf(folder)) | {name: ones(4)})
    with pytest.raises(SpecError, match=f"found {name.replace('.', '[.]')}{hint}") as caught:
        spec_from_hf(folder)
    assert str(caught.value).startswith(f"model.source = '{folder}'")


def test_an_opt_without_biases_that_stores_some_is_refused(tmp_path):
    folder = write_config(tmp_path, CONFIGS["opt"] | {"enable_bias": False})
    tensors = tensors_of(spec_from_hf(folder)) | {"model.decoder.layers.0.fc1.bias": ones(24)}
    write_weights(folder, tensors)
    with pytest.raises(SpecError, match=r"fc1\.bias \(enable_bias is false\)"):
        spec_from_hf(folder)


def test_a_number_of_layers_without_end_is_refused_at_once(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    write_weights(folder, tensors_of(spec_from_hf(folder)))
    write_config(folder, LLAMA | {"num_hidden_layers": 10_000})
    with pytest.raises(SpecError, match=r"missing some, as 21 are for 10000 layers"):
        spec_from_hf(folder)
    write_config(folder, LLAMA | {"num_hidden_layers": 10**15})
    with pytest.raises(SpecError, match=r"layers = 10+: expected less than or equal to 10000"):
        spec_from_hf(folder)


def test_many_tensors_are_counted(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    extra = {f"model.layers.{layer}.self_attn.{x}_proj.bias": ones(8) for layer in (0, 1) for x in "qkv"}
    write_weights(folder, tensors_of(spec_from_hf(folder)) | extra)
    with pytest.raises(SpecError, match=r"k_proj\.bias, .*q_proj\.bias, .*v_proj\.bias and 3 more \("):
        spec_from_hf(folder)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("opt", ["decoder.version"]),
        ("gpt2", ["lm_head.weight"]),
        ("opt", ["lm_head.weight"]),
    ],
)
def test_buffers_that_the_configuration_gives_and_tied_heads_are_allowed(family, names, tmp_path):
    folder = write_config(tmp_path, CONFIGS[family])
    tensors = tensors_of(spec_from_hf(folder))
    write_weights(folder, tensors | {name: ones(32, 16) for name in names})
    assert locate_tensors(spec_from_hf(folder)).keys() == tensors.keys() | {"lm_head.weight"}


def test_an_untied_head_is_wanted(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    tensors = tensors_of(spec_from_hf(folder))
    del tensors["lm_head.weight"]
    write_weights(folder, tensors)
    with pytest.raises(SpecError, match=r"missing lm_head\.weight"):
        spec_from_hf(folder)


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path):
    folder = write_config(tmp_path, LLAMA | {"tie_word_embeddings": True})
    tensors = tensors_of(spec_from_hf(folder))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_weights(folder, tensors)
    assert locate_tensors(spec_from_hf(folder))["model.embed_tokens.weight"].name == "lm_head.weight"
    del tensors["lm_head.weight"]
    write_weights(folder, tensors)
    with pytest.raises(SpecError, match=r"missing model\.embed_tokens\.weight$"):
        spec_from_hf(folder)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    folder = write_config(tmp_path, CONFIGS["gpt2"])
    tensors = tensors_of(spec_from_hf(folder))
    write_weights(folder, tensors | {"ln_f.weight": ones(16)})
    with pytest.raises(SpecError, match=r"found (transformer\.)?ln_f\.weight"):
        spec_from_hf(folder)


def test_another_shape_is_refused_with_both(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    tensors = tensors_of(spec_from_hf(folder)) | {"model.norm.weight": ones(15)}
    write_weights(folder, tensors)
    with pytest.raises(SpecError, match=r"expected model\.norm\.weight of shape \[16\], not \[15\]"):
        spec_from_hf(folder)


@pytest.mark.parametrize(("kind", "width"), [("F8_E4M3", 1), ("I8", 1), ("I32", 4), ("BOOL", 1)])
def test_what_is_no_plain_number_is_refused(kind, width, tmp_path):
    folder = write_config(tmp_path, LLAMA)
    write_weights(folder, tensors_of(spec_from_hf(folder)))
    _store_norm_as(folder / "model.safetensors", kind, width)
    with pytest.raises(SpecError, match=rf"weights in BF16, F16, F32, F64; model\.norm\.weight is {kind}"):
        spec_from_hf(folder)


def _store_norm_as(file: Path, kind: str, width: int) -> None:
    """Replace a tensor by one of a dtype that numpy does not have."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header["model.norm.weight"]
    start, stop = entry["data_offsets"]
    taken = 16 * width
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= stop:
            other["data_offsets"] = [x - (stop - start - taken) for x in other["data_offsets"]]
    entry["dtype"], entry["data_offsets"] = kind, [start, start + taken]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[: start + taken] + data[stop:])


@pytest.mark.parametrize("way", ["..", "{}", "x/../.."])
def test_an_index_that_leads_out_of_its_folder_is_refused(way, tmp_path):
    folder = write_config(tmp_path / "model", LLAMA)
    (folder / "x").mkdir()
    tensors = tensors_of(spec_from_hf(folder))
    split_weights(folder, tensors, ("a.safetensors", f"{way.format(tmp_path)}/outside.safetensors"))
    assert (tmp_path / "outside.safetensors").exists()  # it could be read
    with pytest.raises(SpecError, match=r"weight_map = '.*outside.*': expected the name of a file in"):
        spec_from_hf(folder)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    folder = write_config(tmp_path / "snapshots" / "1", LLAMA)
    write_weights(folder, tensors_of(spec_from_hf(folder)))
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../../blob")
    assert locate_tensors(spec_from_hf(folder))["model.norm.weight"].shape == (16,)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_says_nothing_is_refused(index, tmp_path):
    folder = write_config(tmp_path, LLAMA)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SpecError, match=r"expected a readable model\.safetensors\.index\.json"):
        spec_from_hf(folder)


def test_a_cut_file_is_refused_with_its_name(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    write_weights(folder, tensors_of(spec_from_hf(folder)))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SpecError, match=r"readable weights \(model\.safetensors: "):
        spec_from_hf(folder)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = write_config(tmp_path, LLAMA)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"expected a backbone without adapter_config\.json"):
        spec_from_hf(folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared cases on this machine")
def test_the_shared_case_of_biases_that_nothing_uses():
    with pytest.raises(SpecError, match=r"k_proj\.bias, .* and 9 more \(attention_bias is false\)"):
        spec_from_hf(SHARED / "backbones" / "extra-bias")
