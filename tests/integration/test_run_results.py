"""Real runs on spawned ranks: every task ends as if it had been trained alone with Hugging Face peft."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from muxtune.batches import Alignment
from muxtune.cluster import load_cluster
from muxtune.model import load_model_spec
from muxtune.plan import Parallelism, Plan, check_plan, extend_schedule, finish_plan, save_plan
from muxtune.schedule import COMPUTE, Template, load_trace
from muxtune.support.errors import RunError
from muxtune.tasks import PeftTask, Workload, load_task_data
from runtime import RunOptions, run_plan, validate_run
from runtime.reports.solo import train_solo
from runtime.reports.validate import update_error
from tests.helpers import make_boundless_model, make_plan, make_task, write_examples
from tests.plans import changed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TARGETS = {"llama": ("q_proj", "k_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


@dataclass(frozen=True)
class Case:
    family: str
    alignment: Alignment
    template: Template
    pp: int
    shared_backbone: bool = True

    def __str__(self) -> str:
        shared = "shared" if self.shared_backbone else "instances"
        return f"{self.family}-{self.alignment}-{self.template}-pp{self.pp}-{shared}"


CASES = [
    Case("llama", "pack", "continuous", 2),
    Case("gpt2", "chunk", "flush", 2, shared_backbone=False),
    Case("gpt2", "pad", "continuous", 1),
]


def _tasks(folder: Path, family: str) -> tuple[PeftTask, ...]:
    """Different ranks, lengths, batches, steps, schedules; one clips, one shuffles."""
    targets = TARGETS[family]
    changes: list[dict[str, object]] = [
        {"steps": 6, "max_grad_norm": 0.05, "lr_schedule": "linear", "warmup_steps": 2},
        {"steps": 3, "r": 1, "global_batch_size": 6, "shuffle": True, "seed": 5, "weight_decay": 0.1},
        {"steps": 5, "r": 8, "targets": ("all-linear",), "micro_batch_size": 4, "max_length": 24},
    ]
    return tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=i), **({"targets": targets} | change))
        for i, (name, change) in enumerate(zip("abc", changes, strict=True))
    )


def _plan(case: Case, folder: Path, hf_dirs: dict[str, Path]) -> Plan:
    return make_plan(
        Workload(tasks=_tasks(folder, case.family)),
        load_model_spec(str(hf_dirs[case.family]), "float64"),
        partition=[["a", "b"], ["c"]],
        alignment=case.alignment,
        chunk_tokens=32,
        template=case.template,
        pp=case.pp,
        shared_backbone=case.shared_backbone,
    )


def _adapter(run_dir: Path, task_id: str, name: str = "adapter") -> dict:
    return load_file(run_dir / "tasks" / task_id / name / "adapter_model.safetensors")


def _assert_trained_as_alone(plan: Plan, run_dir: Path) -> None:
    for task in plan.tasks:
        solo = train_solo(plan.model, load_task_data(task, plan.model), task.steps)
        with (run_dir / "tasks" / task.id / "losses.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(task.steps))
        # float64, so only the order of sums differs
        assert [float(row["loss"]) for row in rows] == pytest.approx(solo.losses, rel=1e-9, abs=0)
        initial = _adapter(run_dir, task.id, "adapter-init")
        assert initial.keys() == solo.initial_adapter.keys()
        assert update_error(_adapter(run_dir, task.id), solo.adapter, initial) < 1e-9
        status = json.loads((run_dir / "tasks" / task.id / "status.json").read_text())
        assert (status["state"], status["steps_done"]) == ("finished", task.steps)


@pytest.mark.usefixtures("quick_ranks")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_adapters_equal_those_of_each_task_trained_alone(case, tmp_path, hf_dirs):
    plan = _plan(case, tmp_path, hf_dirs)
    report = run_plan(plan, tmp_path / "run")
    _assert_trained_as_alone(plan, tmp_path / "run")

    played = [span for span in load_trace(tmp_path / "run" / "trace.json") if span.stream == COMPUTE]
    for stage, actions in enumerate(extend_schedule(plan, 6)):
        own = {s.action: s for s in sorted(played, key=lambda s: s.start_s) if s.stage == stage}
        assert list(own) == actions
    weights = sum(memory.backbone_bytes for memory in report.memory) / (plan.model.parameters * 8)
    copies = 1 if case.shared_backbone else 2
    assert copies <= weights < copies * 1.1  # stages hold tied embeddings twice
    assert report.steps == len(report.iteration_s) == 6

    validation = validate_run(plan, tmp_path / "run", solo_steps=2)
    assert validation.max_loss_difference < 1e-9
    assert [task.solo_steps for task in validation.tasks] == [2, 2, 2]
    assert all(task.adapter_error is None for task in validation.tasks)
    assert all((t.loss_spread, t.loss_bound, t.agreement) == (None, 1e-9, "within") for t in validation.tasks)
    assert validate_run(plan, tmp_path / "run", solo_steps=0).max_loss_difference is None


def _mesh_plan(folder: Path, hf_dirs: dict[str, Path], *, tp: int, dp: int, **changes: object) -> Plan:
    """One stage, shared by ``tp`` ranks of each of ``dp`` replicas."""
    tasks = [task.model_copy(update=changes) for task in _tasks(folder, "llama")]
    plan = make_plan(
        Workload(tasks=tuple(tasks)),
        load_model_spec(str(hf_dirs["llama"]), "float64"),
        partition=[["a", "b"], ["c"]],
        template="continuous",
        pp=1,
    )
    mesh = Parallelism(tp=tp, pp=1, dp=dp, layers_per_stage=plan.parallelism.layers_per_stage)
    fields = {"parallelism": mesh, "cluster": load_cluster(f"cpu-{tp * dp}")}
    plan = finish_plan(changed(plan, **fields))
    check_plan(plan)
    return plan


@pytest.mark.usefixtures("quick_ranks")
def test_a_run_on_a_mesh_writes_everything_once_and_resumes_whole_adapters(tmp_path, hf_dirs):
    plan = _mesh_plan(tmp_path, hf_dirs, tp=2, dp=2)
    run_plan(plan, tmp_path / "run", RunOptions(steps=3, checkpoint_every=2))
    for task in plan.tasks:
        (checkpoint,) = (tmp_path / "run" / "tasks" / task.id / "checkpoints").iterdir()
        assert sorted(path.name for path in checkpoint.iterdir()) == [
            f"part-{rank}-of-2.safetensors" for rank in (0, 1)
        ]
    report = run_plan(plan, tmp_path / "run", RunOptions(resume=True))
    assert report.first_step == 2
    _assert_trained_as_alone(plan, tmp_path / "run")

    (memory,) = report.memory
    whole_bytes = plan.model.parameters * 8
    assert 0.5 < memory.backbone_bytes / whole_bytes < 0.6  # norms are whole
    data = [load_task_data(task, plan.model) for task in plan.tasks]
    lengths = [int(each.batch_lengths(k).sum()) for each in data for k in range(2, each.task.steps)]
    assert report.tokens.effective == sum(lengths)
    assert report.tokens.all >= report.tokens.effective  # the streams of both replicas hold them
    played = [span for span in load_trace(tmp_path / "run" / "trace.json") if span.stream == COMPUTE]
    (actions,) = extend_schedule(plan, 6, first=2)
    assert list(dict.fromkeys(s.action for s in sorted(played, key=lambda s: s.start_s))) == actions


@pytest.mark.usefixtures("quick_ranks")
def test_on_a_mesh_one_rank_reports_a_loss_that_is_not_finite(tmp_path, hf_dirs):
    boundless = {"llama": make_boundless_model(tmp_path / "model", hf_dirs["llama"])}
    plan = _mesh_plan(tmp_path, boundless, tp=1, dp=2, max_grad_norm=None)
    with pytest.raises(RunError, match=r"^rank 0: task [abc], step \d+: the loss is (nan|inf)"):
        run_plan(plan, tmp_path / "run", RunOptions(strict=True))
    states = [
        json.loads(path.read_text())["state"] for path in (tmp_path / "run" / "tasks").glob("*/status.json")
    ]
    assert sorted(states) == ["failed", "running", "running"]


def test_torchrun_gives_the_same_adapters_and_peft_loads_them(tmp_path, hf_dirs):
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    plan = _plan(CASES[0], tmp_path, hf_dirs)
    run_plan(plan, tmp_path / "spawned", RunOptions(steps=3))
    save_plan(plan, tmp_path / "plan.json")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom runtime import RunOptions, run_plan\n"
        "report = run_plan(Path(sys.argv[1]), Path(sys.argv[2]), RunOptions(steps=3))\n"
        "assert report.steps == 3\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(tmp_path / "plan.json"), str(tmp_path / "joined")]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=200)
    for task in plan.tasks:
        joined = _adapter(tmp_path / "joined", task.id)
        spawned = _adapter(tmp_path / "spawned", task.id)
        assert all((joined[key] == tensor).all() for key, tensor in spawned.items())

    model = AutoModelForCausalLM.from_pretrained(hf_dirs["llama"], dtype=torch.float64)
    loaded = PeftModel.from_pretrained(model, tmp_path / "joined" / "tasks" / "a" / "adapter")
    state = get_peft_model_state_dict(loaded)
    assert all((state[key] == tensor).all() for key, tensor in _adapter(tmp_path / "joined", "a").items())
