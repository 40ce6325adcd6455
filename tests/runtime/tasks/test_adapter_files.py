from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from muxtune.support.errors import SpecError
from runtime.backbone.hugging_face import load_hf_model
from runtime.tasks.adapter_files import initial_adapter, load_adapter, save_adapter
from tests.runtime.worlds import BACKBONES, make_task

SOME = {"llama": ("q_proj", "mlp.down_proj"), "gpt2": ("c_attn", "c_proj"), "opt": ("v_proj", "fc2")}


def pefts_own(spec, task):
    model = load_hf_model(spec)
    torch.manual_seed(task.seed)
    config = LoraConfig(
        r=task.peft.r,
        lora_alpha=task.peft.alpha,
        target_modules="all-linear" if task.peft.targets == ("all-linear",) else list(task.peft.targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=spec.family == "gpt2",
    )
    return get_peft_model_state_dict(get_peft_model(model, config))


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("some", [True, False])
def test_initial_adapter_is_bitwise_what_peft_draws_on_the_real_model(family, dtype, some, tmp_path):
    spec = BACKBONES[family].model_copy(update={"dtype": dtype})
    task = make_task("t", r=3, targets=SOME[family] if some else ("all-linear",), seed=11)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    initial_adapter(spec, task, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = load_adapter(tmp_path), pefts_own(spec, task)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


def test_config_names_backbone_and_hyper_parameters(tmp_path):
    initial_adapter(BACKBONES["llama"], make_task("t", r=3), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["base_model_name_or_path"] == "llama-test"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("hash_seed", ["1", "2", "3"])
def test_config_is_the_same_in_every_process(hash_seed, tmp_path):
    """Peft has the targets in a set, whose order is drawn anew by every interpreter."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    code = (
        "import sys\nfrom pathlib import Path\nfrom runtime.tasks.adapter_files import initial_adapter\n"
        "from tests.runtime.worlds import BACKBONES, make_task\n"
        f"initial_adapter(BACKBONES['llama'], make_task('t', targets={targets!r}), Path(sys.argv[1]))\n"
    )
    environment = dict(os.environ) | {"PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=200)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapter_loads_with_peft(dtype, tmp_path):
    spec = BACKBONES["llama"].model_copy(update={"dtype": dtype})
    initial_adapter(spec, make_task("t"), tmp_path / "init")
    trained = {key: tensor + 1 for key, tensor in load_adapter(tmp_path / "init").items()}
    save_adapter(tmp_path / "adapter", trained, like=tmp_path / "init")
    model = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "adapter")
    for key, tensor in get_peft_model_state_dict(model).items():
        assert tensor.dtype == trained[key].dtype
        assert torch.equal(tensor, trained[key])


def test_an_incomplete_adapter_is_refused_and_the_old_one_stays(tmp_path):
    initial_adapter(BACKBONES["llama"], make_task("t"), tmp_path)
    tensors = load_adapter(tmp_path)
    removed = sorted(tensors)[0]
    partial = {key: tensor for key, tensor in tensors.items() if key != removed}
    with pytest.raises(SpecError, match=removed):
        save_adapter(tmp_path, partial, like=tmp_path)
    assert load_adapter(tmp_path).keys() == tensors.keys()


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"adapter_model\.safetensors'?: expected a readable safetensors"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(SpecError, match="expected a readable safetensors file"):
        load_adapter(tmp_path)
