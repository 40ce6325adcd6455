"""What a run refuses before it starts or writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from muxtune.model import PRESETS, load_model_spec
from muxtune.plan import Plan, finish_plan, load_plan, save_plan
from muxtune.support.errors import SpecError, UserError
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan
from runtime.launch import run
from tests.helpers import make_hf_model, make_plan, make_task, write_examples
from tests.plans import changed


@pytest.fixture
def plan(tmp_path) -> Plan:
    task = make_task("a", write_examples(tmp_path / "data" / "a.jsonl", seed=0))
    return make_plan(Workload(tasks=(task,)), PRESETS["llama-tiny"], partition=[["a"]])


def _refused(plan: Plan | Path, out_dir: Path, message: str, kind: type[UserError] = SpecError, **options):
    existed = out_dir.exists()
    with pytest.raises(kind, match=message) as caught:
        run_plan(plan, out_dir, RunOptions(**options))
    assert "\n" not in str(caught.value)
    assert out_dir.exists() == existed


def _changed(plan: Plan, **changes: object) -> Plan:
    return finish_plan(changed(plan, **changes))


def test_more_steps_than_the_longest_task_has(plan, tmp_path):
    _refused(plan, tmp_path / "run", "steps = 6: expected 1 to 5", steps=6)


def test_a_changed_dataset(plan, tmp_path):
    write_examples(tmp_path / "data" / "a.jsonl", seed=1)
    _refused(plan, tmp_path / "run", r"tasks\.a\.dataset\.path = .*: expected the file that the plan")


def test_a_missing_dataset(plan, tmp_path):
    (tmp_path / "data" / "a.jsonl").unlink()
    _refused(plan, tmp_path / "run", r"tasks\.a\.dataset\.path = .*: expected a readable JSONL file")


def test_a_truncated_plan(plan, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    _refused(tmp_path / "plan.json", tmp_path / "run", "not a whole JSON file", UserError)


def test_devices_that_this_machine_has_not(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    device = plan.cluster.device.model_copy(update={"kind": "cuda"})
    cluster = plan.cluster.model_copy(update={"device": device})
    message = (
        r"plan: decisions\.cluster\.device\.kind = 'cuda': expected 2 CUDA devices on .*torch finds none"
    )
    _refused(_changed(plan, cluster=cluster), tmp_path / "run", message)
    _refused(plan, tmp_path / "run", r"^device = 'cuda': expected 2 CUDA devices", device="cuda")


def test_shards_that_the_heads_cannot_be_dealt_out_to(plan, tmp_path):
    mesh = plan.parallelism.model_copy(update={"tp": 3})
    cluster = plan.cluster.model_copy(update={"ranks": 6})
    message = r"plan: decisions\.parallelism\.tp = 3: expected a divisor of 8, the heads of llama-tiny"
    _refused(_changed(plan, parallelism=mesh, cluster=cluster), tmp_path / "run", message)


def test_an_attention_backend_that_the_device_cannot_run(plan, tmp_path):
    execution = plan.execution.model_copy(update={"attention": "varlen"})
    message = (
        r"plan: decisions\.execution\.attention = 'varlen': expected one that trains on this device "
        r"\(grouped, loop, masked\): varlen needs a CUDA device$"
    )
    _refused(_changed(plan, execution=execution), tmp_path / "run", message)


def test_a_plan_that_does_not_fit_the_memory(plan, tmp_path):
    predicted = plan.predicted.model_copy(update={"peak_memory_bytes": (1, 2**60)})
    message = r"predicted\.peak_memory_bytes = 1073741824\.0 GiB: expected at most [\d.]+ GiB"
    _refused(_changed(plan, predicted=predicted), tmp_path / "run", message)


def test_a_plan_for_larger_devices_than_there_are(plan, tmp_path):
    """Its own cluster would hold it."""
    device = plan.cluster.device.model_copy(update={"kind": "cuda", "memory_bytes": 2**61})
    changes = {
        "cluster": plan.cluster.model_copy(update={"device": device}),
        "predicted": plan.predicted.model_copy(update={"peak_memory_bytes": (1, 2**60)}),
    }
    message = (
        r"^plan: predicted\.peak_memory_bytes = \d.* GiB: expected at most \d.* GiB, the memory of .*, for 2 "
    )
    _refused(_changed(plan, **changes), tmp_path / "run", message, device="cpu")


def test_torchrun_asks_about_the_gpu_of_each_rank(plan, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: asked.append(device) or (8, 0))
    monkeypatch.setattr(run, "check_memory", lambda *arguments: None)
    names = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "node-0"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    run._check(plan, 1, "plan", "cuda")
    assert asked == ["cuda:1"]


def test_no_checkpoints_at_all(plan, tmp_path):
    _refused(plan, tmp_path / "run", "checkpoint_every = 0: expected at least 1", checkpoint_every=0)


def test_a_rank_that_may_never_answer(plan, tmp_path):
    _refused(plan, tmp_path / "run", r"peer_timeout_s = 0\.0: expected seconds above 0", peer_timeout_s=0.0)


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 1e15, -1.0, 1e-9])
def test_a_timeout_that_torch_cannot_count(plan, tmp_path, timeout_s):
    message = r"^peer_timeout_s = .*: expected seconds above 0, 0\.001 to 604800 \(a week\)$"
    _refused(plan, tmp_path / "run", message, peer_timeout_s=timeout_s)


def test_a_run_that_counts_no_memory_at_all(plan, tmp_path):
    _refused(plan, tmp_path / "run", "^metered_steps = 0: expected at least 1$", metered_steps=0)


def test_a_folder_that_is_not_empty(plan, tmp_path):
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    (out_dir / "notes.txt").write_text("mine")
    _refused(plan, out_dir, "is not empty; expected a new folder, or --resume", UserError)
    _refused(plan, out_dir, "has no plan.json", UserError, resume=True)
    assert [path.name for path in out_dir.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "left",
    [["backbone.json"], [".lock", "plans/", ".plan.json.0123abcd"]],
    ids=str,
)
def test_a_start_that_was_killed_before_there_was_a_plan_is_done_anew(
    plan, tmp_path, monkeypatch, left, resume
):
    out_dir = tmp_path / "run"
    for name in left:
        path = out_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("{")
    began = []
    monkeypatch.setattr(run, "launch_ranks", lambda job, *_: began.append(job.first_step))
    monkeypatch.setattr(run, "load_report", lambda path: path)
    run_plan(plan, out_dir, RunOptions(resume=resume))
    assert began == [0]
    assert load_plan(out_dir / "plan.json") == plan
    assert not list(out_dir.glob(".plan.json.*"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to: /proc")
def test_a_folder_that_cannot_be_made(plan):
    message = "^/proc/run cannot be made: .*; expected a folder for the run$"
    _refused(plan, Path("/proc/run"), message, UserError)


def test_a_file_in_place_of_the_folder(plan, tmp_path):
    (tmp_path / "run").write_text("")
    _refused(plan, tmp_path / "run", "is a file; expected a folder", UserError)


def test_resuming_with_other_tasks(plan, tmp_path):
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    first, *others = plan.tasks
    save_plan(_changed(plan, tasks=(first.model_copy(update={"seed": 77}), *others)), out_dir / "plan.json")
    _refused(plan, out_dir, "has a run of other tasks; expected the plan in", UserError, resume=True)


def test_resuming_what_an_earlier_version_has_left(plan, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-000010").mkdir(parents=True)
    save_plan(plan, tmp_path / "run" / "plan.json")
    _refused(plan, tmp_path / "run", "of an earlier version of muxtune", UserError, resume=True)


def test_a_backbone_directory_that_changed_or_went_away(tmp_path):
    folder = make_hf_model(tmp_path / "model", "llama")
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0))
    plan = make_plan(Workload(tasks=(task,)), load_model_spec(str(folder)), partition=[["a"]])
    make_hf_model(tmp_path / "model", "llama", layers=5)
    _refused(
        plan,
        tmp_path / "run",
        r"decisions\.model\.source = .*: expected the backbone that the plan was",
    )
    (folder / "model.safetensors").unlink()
    _refused(plan, tmp_path / "run", r"decisions\.model\.source = .*: expected a directory with weights")


def test_torchrun_with_another_number_of_ranks(plan, tmp_path, monkeypatch):
    _be_alone_under_torchrun(monkeypatch)
    message = r"^rank 0: torchrun started 1 ranks \(WORLD_SIZE\); expected 2"
    _refused(plan, tmp_path / "run", message, UserError)


def _be_alone_under_torchrun(monkeypatch):
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_launcher_that_does_not_say_which_ranks_are_here(plan, tmp_path, monkeypatch, name, device):
    _be_alone_under_torchrun(monkeypatch)
    monkeypatch.delenv(name)
    message = (
        rf"^rank 0: {name} = None: expected .*; torchrun sets it beside RANK, WORLD_SIZE and MASTER_ADDR$"
    )
    _refused(plan, tmp_path / "run", message, UserError, device=device)


def test_a_timeout_that_torch_cannot_count_under_torchrun(plan, tmp_path, monkeypatch):
    _be_alone_under_torchrun(monkeypatch)
    message = r"^rank 0: peer_timeout_s = inf: expected seconds above 0"
    _refused(plan, tmp_path / "run", message, UserError, peer_timeout_s=float("inf"))
