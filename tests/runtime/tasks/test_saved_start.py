"""Tasks that start from a saved adapter of peft: checked when planned, trained on from its values."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from muxtune.peft import check_peft, start_digest
from muxtune.peft.lora import LoraSpec
from muxtune.support.errors import SpecError
from muxtune.tasks import workload_from
from runtime.backbone.hugging_face import load_hf_model
from runtime.peft import RUNTIME_METHODS
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from tests.runtime.worlds import LLAMA, make_task

MODEL = LLAMA.model_copy(update={"layers": 2})
SAID = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TASK = {"method": "lora", "r": 3, "alpha": 6, "targets": ["q_proj", "down_proj"]}


def saved(folder, **changes):
    """What a user of peft saves."""
    model = get_peft_model(load_hf_model(MODEL), LoraConfig(**SAID | changes))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return get_peft_model_state_dict(model)


def task(folder, **changes):
    return make_task("t").model_copy(
        update={"peft": LoraSpec.model_validate(TASK | {"init": str(folder)} | changes)}
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({}, {"dropout": 0.1, "targets": r".*(q_proj|down_proj)"}),
        (
            {"use_rslora": True, "rank_pattern": {"q_proj": 1}},
            {"use_rslora": True, "rank_pattern": {"q_proj": 1}},
        ),
        ({"use_dora": True, "bias": "lora_only"}, {"use_dora": True, "bias": "lora_only"}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"layers_to_transform": [1]}, {"layers": [1]}),
    ],
    ids=str,
)
def test_it_starts_with_the_saved_values_and_so_does_its_reference(theirs, ours, tmp_path):
    values = saved(tmp_path / "saved", **theirs)
    started = task(tmp_path / "saved", **ours)
    check_peft(started.peft, MODEL, "tasks.t.peft")
    initial_adapter(MODEL, started, tmp_path / "init")
    reference = RUNTIME_METHODS.get("lora").reference(load_hf_model(MODEL), started, MODEL)
    for found in (load_adapter(tmp_path / "init"), reference.state()):
        assert found.keys() == values.keys()
        assert all(torch.equal(found[key], value) for key, value in values.items())


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            {},
            {"r": 4, "alpha": 8},
            "rank 4 and scale 2 at model.layers.0.mlp.down_proj, and not rank 3 and scale 2",
        ),
        ({}, {"alpha": 3}, "rank 3 and scale 1 at"),
        ({}, {"targets": ["q_proj"]}, "nothing at model.layers.0.mlp.down_proj, and not rank 3 and scale 2"),
        ({}, {"layers": [0]}, "nothing at model.layers.1."),
        ({}, {"use_dora": True}, "an adapter with use_dora True as the task has it, and not False"),
        ({"bias": "lora_only"}, {}, "an adapter with bias 'none' as the task has it, and not 'lora_only'"),
        ({"use_rslora": True}, {}, "an adapter with use_rslora False as the task has it, and not True"),
        ({"lora_bias": True}, {}, "an adapter without lora_bias, which is not executed"),
        ({"modules_to_save": ["lm_head"]}, {}, "an adapter without modules_to_save, which is not executed"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_in_one_line(theirs, ours, message, tmp_path):
    saved(tmp_path / "saved", **theirs)
    with pytest.raises(SpecError) as caught:
        check_peft(task(tmp_path / "saved", **ours).peft, MODEL, "tasks.t.peft")
    assert str(caught.value).startswith("tasks.t.peft.init = ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_saved_adapter_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SpecError, match=r"expected a folder with adapter_config\.json and adapter_model"):
            check_peft(task(folder).peft, MODEL, "tasks.t.peft")
    saved(tmp_path / "saved")
    (tmp_path / "saved/adapter_config.json").write_text("[]")
    with pytest.raises(SpecError, match="the first is no object"):
        check_peft(task(tmp_path / "saved").peft, MODEL, "tasks.t.peft")


def test_other_methods_say_that_they_do_not_start_so(tmp_path):
    saved(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    (tmp_path / "saved/adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(SpecError, match="an adapter with peft_type 'LORA' as the task has it, and not 'IA3'"):
        check_peft(task(tmp_path / "saved").peft, MODEL, "tasks.t.peft")


def test_tensors_of_another_shape_are_named(tmp_path):
    saved(tmp_path / "saved")
    path = tmp_path / "saved/adapter_model.safetensors"
    tensors = load_file(path)
    key = min(tensors)
    save_file(tensors | {key: torch.zeros(1, 2)}, path)
    with pytest.raises(SpecError, match=rf"{key} = \(1, 2\): expected \(3, 40\), as the task has it"):
        initial_adapter(MODEL, task(tmp_path / "saved"), tmp_path / "init")


def test_one_that_changed_since_it_was_planned_is_refused(tmp_path):
    saved(tmp_path / "saved")
    planned = task(tmp_path / "saved").with_digests(
        dataset=None, init=start_digest(tmp_path / "saved", "peft.init")
    )
    initial_adapter(MODEL, planned, tmp_path / "init")
    saved(tmp_path / "saved", lora_dropout=0.1)
    with pytest.raises(
        SpecError, match=r"tasks\.t\.peft\.init = .*: expected the adapter that the plan was made"
    ):
        initial_adapter(MODEL, planned, tmp_path / "init")


def test_the_folder_is_relative_to_the_workload_file(tmp_path):
    entry = make_task("t").model_dump(mode="json") | {"peft": TASK | {"init": "checkpoints/a"}}
    workload = workload_from({"tasks": [entry]}, "w.yaml", tmp_path)
    assert workload.tasks[0].peft.init == (tmp_path / "checkpoints/a").resolve()
    assert workload.tasks[0].peft.model_dump(mode="json")["init"] == str(
        (tmp_path / "checkpoints/a").resolve()
    )
