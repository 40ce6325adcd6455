"""A backbone that changed is refused by run, by --resume and by validate, with what changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from muxtune.model import backbone_digest, load_model_spec
from muxtune.plan import Plan, finish_plan, record_backbone, save_plan
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan, validate_run
from tests.helpers import make_plan, make_task, write_examples
from tests.plans import changed


def _scale_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _swap_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _scale_rope(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(content))


CHANGES = {
    "weights": (_scale_weights, "weights"),
    "tokenizer": (_swap_tokens, "tokenizer"),
    "rope": (_scale_rope, r"configuration \(config\.json\)"),
}


@pytest.fixture(params=CHANGES)
def change(request):
    return CHANGES[request.param]


@pytest.fixture
def folder(tmp_path, hf_dirs) -> Path:
    return shutil.copytree(hf_dirs["llama"], tmp_path / "model")


def _plan(folder: Path, tmp_path: Path, *, digest: bool) -> Plan:
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0))
    model = load_model_spec(str(folder))
    plan = make_plan(Workload(tasks=(task,)), model, partition=[["a"]])
    return finish_plan(changed(plan, backbone=backbone_digest(model) if digest else None))


def _begun(plan: Plan, run_dir: Path) -> Path:
    """As a run leaves its folder when it is stopped at once."""
    run_dir.mkdir()
    save_plan(plan, run_dir / "plan.json")
    record_backbone(plan, run_dir)
    return run_dir


def test_run_refuses_what_the_plan_was_not_made_for(change, folder, tmp_path):
    plan = _plan(folder, tmp_path, digest=True)
    alter, part = change
    alter(folder)
    message = (
        rf"^plan: decisions\.model\.source = '.*model': expected the {part} that "
        r"the plan was made for \(plan again\)$"
    )
    with pytest.raises(SpecError, match=message):
        run_plan(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("digest", [True, False], ids=["planned", "planned without weights"])
def test_resume_and_validate_refuse_what_the_run_did_not_begin_with(digest, change, folder, tmp_path):
    plan = _plan(folder, tmp_path, digest=digest)
    run_dir = _begun(plan, tmp_path / "run")
    alter, part = change
    alter(folder)
    message = rf"model\.source = '.*model': expected the {part} that the (plan was made for|run began with)"
    with pytest.raises(SpecError, match=message):
        run_plan(plan, run_dir, RunOptions(resume=True))
    with pytest.raises(SpecError, match=message):
        validate_run(plan, run_dir)


def test_what_changed_back_is_not_refused_for_that(folder, tmp_path):
    plan = _plan(folder, tmp_path, digest=True)
    run_dir = _begun(plan, tmp_path / "run")
    before = (folder / "model.safetensors").read_bytes()
    _scale_weights(folder)
    (folder / "model.safetensors").write_bytes(before)
    with pytest.raises(SpecError, match=r"^steps = 99: expected 1 to 5"):
        run_plan(plan, run_dir, RunOptions(resume=True, steps=99))
    with pytest.raises(Exception, match=r"cannot read the report"):
        validate_run(plan, run_dir)


def test_a_record_that_is_damaged_is_named(folder, tmp_path):
    plan = _plan(folder, tmp_path, digest=True)
    run_dir = _begun(plan, tmp_path / "run")
    (run_dir / "backbone.json").write_text('{"config": 3}')
    with pytest.raises(SpecError, match=r"^\S*backbone\.json: config = 3: expected "):
        run_plan(plan, run_dir, RunOptions(resume=True))
