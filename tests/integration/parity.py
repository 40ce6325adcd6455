"""Runs plans for real and compares every task with its solo run; both are kept for the whole session."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import load_file
from torch import Tensor

from muxtune.alignment import Alignment
from muxtune.cluster import load_cluster
from muxtune.model import Dtype, load_model_spec
from muxtune.plan import Plan
from muxtune.planning.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.schedule import Template
from muxtune.workload import load_workload
from runtime import run_plan
from tests.helpers import TINY_PRESETS
from tests.integration.solo_peft import SoloResult, SoloTask, train_solo
from tests.integration.tiny_models import (
    save_gpt2,
    save_llama,
    save_opt,
    save_preset,
    write_plain_texts,
    write_prompts,
)
from tests.muxtune.planning.problems import FakeCosts

TaskFields = Mapping[str, object]
"""A task as in a workload file, without its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run, and how it is planned."""

    backbone: str
    """A preset, or the name of one of the directories of :class:`ParityBench`."""
    tasks: tuple[str, ...]
    partition: str | None = None
    policy: str = "muxtune"
    template: Template = "continuous"
    alignment: Alignment = "pack"
    chunk_tokens: int | None = None
    pp: int = 2
    tp: int = 1
    dp: int = 1
    dtype: Dtype = "float64"

    def __str__(self) -> str:
        fusion = self.policy if self.partition is None else f"{len(self.partition.split(','))}htasks"
        mesh = [f"{name}{n}" for name, n in (("tp", self.tp), ("dp", self.dp)) if n > 1]
        parts = (self.backbone, fusion, self.template, self.alignment, *mesh, f"pp{self.pp}", self.dtype)
        return "-".join(parts)

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a task is from its solo run, or how far it may be."""

    loss: float
    """|difference| / |loss|, largest over the steps."""
    update: float
    """||difference|| / ||final - initial||, over all tensors of the adapter."""
    element: float
    """|difference|, largest over all elements of the adapter."""

    def within(self, limit: Difference) -> bool:
        """Whether every measure is."""
        return self.loss <= limit.loss and self.update <= limit.update and self.element <= limit.element


STRICT = Difference(loss=1e-9, update=1e-9, element=1e-9)
"""float64: only the order of sums differs.

LlamaRMSNorm rounds its input to float32 in every dtype, so two values 1e-16 apart may come out 6e-8 apart.
A task that misses the limit by little may have met such a rounding: it depends on the order of sums, and so
on the processor.
"""

ROUNDED = Difference(loss=1e-5, update=1e-3, element=float("inf"))
"""float32: only the order of sums, but AdamW amplifies the rounding of tiny gradients."""

KINKED = Difference(loss=2e-3, update=0.1, element=float("inf"))
"""float32 and ReLU: rounding puts a unit next to zero on the other side, and its gradient comes or goes.

Peft differs as much from itself: over ten movements of opt-tiny's weights by half a unit in the last place,
each of twenty steps, losses by up to 2e-4 and updates by up to 2e-2, and by 1e-7 and 1e-5 where none was hit.
"""


class ParityBench:
    """Models, texts, solo runs and real runs of one session.

    Args:
        folder: Everything goes there.
        tasks: Tasks by id.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, TaskFields]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._solo: dict[tuple[str, str, str], SoloResult] = {}
        self._runs: dict[Case, Path] = {}
        write_prompts(folder / "short.jsonl", seed=10, count=24, prompt_words=(1, 9))
        write_prompts(folder / "long.jsonl", seed=20, count=24, prompt_words=(4, 18))
        write_prompts(folder / "few.jsonl", seed=30, count=10, prompt_words=(1, 12))
        write_plain_texts(folder / "plain.jsonl", seed=40, count=16, words=(1, 7))

    def directory(self, backbone: str) -> Path:
        """Hugging Face directory of a backbone; of a preset, one that must be the same model."""
        folder = self._folder / "models" / backbone
        if not folder.exists():
            if backbone in TINY_PRESETS:
                save_preset(folder, backbone)
            elif backbone == "gpt2":
                save_gpt2(folder)
            elif backbone.startswith("opt"):
                save_opt(folder, plain=backbone == "opt")
            else:
                save_llama(folder, plain=backbone == "llama")
        return folder

    def solo_task(self, task_id: str, backbone: str, dtype: str) -> SoloTask:
        """A task in plain numbers."""
        fields = dict(self._tasks[task_id])
        peft, dataset = fields.pop("peft"), fields.pop("dataset")
        del fields["micro_batch_size"]  # means nothing for the result
        return SoloTask(
            model_dir=self.directory(backbone),
            dtype=dtype,
            byte_tokens=backbone in TINY_PRESETS,
            dataset=self._folder / dataset["path"],
            r=peft["r"],
            alpha=peft["alpha"],
            targets=tuple(peft["targets"]),
            **fields,
        )

    def solo(self, task_id: str, backbone: str, dtype: str) -> SoloResult:
        """The task alone."""
        key = (task_id, backbone, dtype)
        if key not in self._solo:
            folder = self._folder / "solo" / "-".join(key)
            self._solo[key] = train_solo(self.solo_task(*key), folder)
        return self._solo[key]

    def plan(self, case: Case) -> Plan:
        """Plan a case from a workload file, as a user would."""
        backbone = case.backbone if case.backbone in TINY_PRESETS else str(self.directory(case.backbone))
        workload_file = self._folder / "workload.yaml"
        content = {"dtype": case.dtype, "tasks": [{"id": name, **self._tasks[name]} for name in case.tasks]}
        workload_file.write_text(yaml.safe_dump({"backbone": backbone, **content}))
        workload = load_workload(workload_file)
        options = PlanOptions(
            partition=case.partition,
            alignment=case.alignment,
            chunk_tokens=case.chunk_tokens,
            template=case.template,
            tp=case.tp,
            pp=case.pp,
            dp=case.dp,
        )
        model = load_model_spec(backbone, workload.dtype)
        cluster = load_cluster(f"cpu-{case.ranks}")
        plan = plan_workload(workload, model, cluster, FakeCosts(), policy=case.policy, options=options)[0]
        mesh = plan.parallelism
        assert (plan.template, mesh.tp, mesh.pp, mesh.dp) == (case.template, case.tp, case.pp, case.dp)
        assert {htask.alignment for htask in plan.htasks} == {case.alignment}
        return plan

    def run(self, case: Case) -> Path:
        """Execute a case on spawned ranks; its RUN_DIR."""
        if case not in self._runs:
            run_dir = self._folder / "runs" / f"{len(self._runs)}-{case}"
            run_plan(self.plan(case), run_dir)
            self._runs[case] = run_dir
        return self._runs[case]

    def compare(self, case: Case) -> dict[str, Difference]:
        """Difference of every task of a case to its solo run."""
        self.directory(case.backbone)
        # The run waits for its ranks; the main thread does that, because a deadline interrupts only it.
        with ThreadPoolExecutor(max_workers=1) as beside:
            solos = {
                task_id: beside.submit(self.solo, task_id, case.backbone, case.dtype)
                for task_id in case.tasks
            }
            run_dir = self.run(case)
        return {
            task_id: compare_with_solo(run_dir, task_id, solo.result()) for task_id, solo in solos.items()
        }


def read_losses(run_dir: Path, task_id: str) -> tuple[list[float], list[int]]:
    """Loss and number of targets of every step."""
    with (run_dir / "tasks" / task_id / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    return [float(row["loss"]) for row in rows], [int(row["target_tokens"]) for row in rows]


def read_adapter(run_dir: Path, task_id: str, name: str = "adapter") -> dict[str, Tensor]:
    """Tensors of a task's adapter; ``name`` may be ``adapter-init``."""
    return load_file(run_dir / "tasks" / task_id / name / "adapter_model.safetensors")


def compare_with_solo(run_dir: Path, task_id: str, solo: SoloResult) -> Difference:
    """Difference of a task of a run to its solo run; what may not differ at all is asserted."""
    losses, target_tokens = read_losses(run_dir, task_id)
    assert target_tokens == solo.target_tokens, task_id
    initial = read_adapter(run_dir, task_id, "adapter-init")
    assert initial.keys() == solo.initial_adapter.keys()
    for key, tensor in solo.initial_adapter.items():
        assert initial[key].dtype == tensor.dtype
        assert initial[key].equal(tensor), f"{task_id}: initial {key}"
    adapter = read_adapter(run_dir, task_id)
    return compare_results(losses, adapter, solo.losses, solo.adapter, initial)


def compare_results(
    losses: list[float],
    adapter: Mapping[str, Tensor],
    reference_losses: list[float],
    reference: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
) -> Difference:
    """Difference of two trainings of a task that started from the same adapter."""
    assert adapter.keys() == reference.keys() == initial.keys()
    apart = [(adapter[key] - tensor).double() for key, tensor in reference.items()]
    updates = [(tensor - initial[key]).double() for key, tensor in reference.items()]
    assert all(bool(update.any()) for update in updates), "every tensor of the adapter is trained"
    return Difference(
        loss=max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses, strict=True)),
        update=_norm(apart) / _norm(updates),
        element=max(float(each.abs().max()) for each in apart),
    )


def assert_same(differences: Mapping[str, Difference], case: Case) -> None:
    """All tasks of a run of ``case`` are as near to a reference as its dtype and backbone allow.

    Args:
        differences: By task id.
        case: What was run.
    """
    in_float32 = KINKED if case.backbone in {"opt", "opt-tiny"} else ROUNDED
    limit = STRICT if case.dtype == "float64" else in_float32
    beyond = {task_id: each for task_id, each in differences.items() if not each.within(limit)}
    assert not beyond, f"{case}: {beyond}"


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5
