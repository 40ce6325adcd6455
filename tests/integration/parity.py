"""Runs plans for real and compares every task with its solo run; both are kept for the whole session."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from muxtune.batches import Alignment
from muxtune.cluster import load_cluster
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.orchestration import Mode
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.schedule import Template
from muxtune.tasks import Workload, load_workload
from runtime import run_plan
from tests.helpers import TINY_PRESETS, make_plan
from tests.integration.differences import STRICT, Difference, bfloat16_limit, compare_results, float32_limit
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
    policy: str | None = "muxtune"
    """Which one plans it; None if the partition is written into a plan as it stands."""
    template: Template = "continuous"
    alignment: Alignment = "pack"
    chunk_tokens: int | None = None
    carry: int = 1
    """Micro-batches over which the chunks of a sequence may spread; more than 1 only without a policy."""
    pp: int = 2
    tp: int = 1
    dp: int = 1
    orchestration: Mode | None = None
    dtype: Dtype = "float64"
    dropout: float | None = None
    """Of all tasks of LoRA, if not their own."""

    def __str__(self) -> str:
        fusion = self.policy if self.partition is None else f"{len(self.partition.split(','))}htasks"
        more = (("carry", self.carry), ("tp", self.tp), ("dp", self.dp))
        numbers = [f"{name}{n}" for name, n in more if n > 1]
        parts = [self.backbone, fusion, self.template, self.alignment, *numbers, f"pp{self.pp}", self.dtype]
        if self.orchestration is not None:
            parts.append(self.orchestration)
        if self.dropout is not None:
            parts.append(f"dropout{self.dropout}")
        return "-".join(str(part) for part in parts)

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tp * self.pp * self.dp


class ParityBench:
    """Models, texts, solo runs and real runs of one session.

    Args:
        folder: Everything goes there.
        tasks: Tasks by id.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, TaskFields]) -> None:
        self._folder = folder
        self._tasks = tasks
        self._solo: dict[SoloTask, SoloResult] = {}
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
                one_kv_head = backbone == "llama-one-kv-head"
                save_llama(folder, plain=backbone != "llama-biases", kv_heads=1 if one_kv_head else 2)
        return folder

    def fields(self, task_id: str, dropout: float | None = None) -> dict[str, Any]:
        """A task as in a workload file; with this dropout, if it is given one and its method has any."""
        fields = dict(self._tasks[task_id])
        if dropout is not None and fields["peft"]["method"] == "lora":
            fields["peft"] = {**fields["peft"], "dropout": dropout}
        return fields

    def solo_task(
        self, task_id: str, backbone: str, dtype: str, dropout: float | None = None, **variant: bool
    ) -> SoloTask:
        """A task in plain numbers.

        Args:
            task_id: Which.
            backbone: Preset or directory.
            dtype: Of the backbone.
            dropout: Instead of its own.
            variant: ``exact``, ``float32_adapter``, ``one_batch`` of the :class:`SoloTask`.
        """
        fields = self.fields(task_id, dropout)
        peft, dataset = fields.pop("peft"), fields.pop("dataset")
        del fields["micro_batch_size"]  # means nothing for the result
        return SoloTask(
            model_dir=self.directory(backbone),
            dtype=dtype,
            byte_tokens=backbone in TINY_PRESETS,
            dataset=self._folder / dataset["path"],
            peft=json.dumps(peft),
            **fields,
            **variant,
        )

    def solo(
        self, task_id: str, backbone: str, dtype: str, dropout: float | None = None, **variant: bool
    ) -> SoloResult:
        """The task alone; arguments of :meth:`solo_task`."""
        task = self.solo_task(task_id, backbone, dtype, dropout, **variant)
        if task not in self._solo:
            self._solo[task] = train_solo(task, self._folder / "solo" / str(len(self._solo)))
        return self._solo[task]

    def plan(self, case: Case) -> Plan:
        """Plan a case from a workload file, as a user would."""
        backbone = case.backbone if case.backbone in TINY_PRESETS else str(self.directory(case.backbone))
        workload_file = self._folder / "workload.yaml"
        tasks = [{"id": name, **self.fields(name, case.dropout)} for name in case.tasks]
        content = {"backbone": backbone, "dtype": case.dtype, "tasks": tasks}
        workload_file.write_text(yaml.safe_dump(content))
        workload = load_workload(workload_file)
        model = load_model_spec(backbone, workload.dtype)
        if case.policy is None:
            return _plan_as_written(case, workload, model)
        options = PlanOptions(
            partition=case.partition,
            alignment=case.alignment,
            chunk_tokens=case.chunk_tokens,
            template=case.template,
            tp=case.tp,
            pp=case.pp,
            dp=case.dp,
            orchestration=case.orchestration,
        )
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
        """Difference of every task of a case to its solo run; if that is in bfloat16, to an exact one."""
        self.directory(case.backbone)
        # The run waits for its ranks; the main thread does that, because a deadline interrupts only it.
        with ThreadPoolExecutor(max_workers=1) as beside:
            solos = {
                task_id: beside.submit(
                    self.solo,
                    task_id,
                    case.backbone,
                    case.dtype,
                    case.dropout,
                    exact=case.dtype == "bfloat16",
                )
                for task_id in case.tasks
            }
            run_dir = self.run(case)
        return {
            task_id: compare_with_solo(run_dir, task_id, solo.result()) for task_id, solo in solos.items()
        }

    def limit(self, case: Case, task_id: str) -> Difference:
        """What :meth:`compare` may find for a task."""
        if case.dtype == "float64":
            return STRICT
        if case.dtype == "float32":
            return float32_limit(case.backbone, self.spread(case, task_id))
        return bfloat16_limit(self.bfloat16_error(case, task_id))

    def spread(self, case: Case, task_id: str) -> Difference:
        """Difference of peft from itself, between two batchings of the same data."""
        key = (task_id, case.backbone, case.dtype, case.dropout)
        solo, again = self.solo(*key), self.solo(*key, one_batch=True)
        return compare_results(again.losses, again.adapter, solo.losses, solo.adapter, solo.initial_adapter)

    def bfloat16_error(self, case: Case, task_id: str, **variant: bool) -> Difference:
        """Difference of the solo run in bfloat16, or a variant of it, to the same training in float64."""
        key = (task_id, case.backbone, "bfloat16", case.dropout)
        solo, exact = self.solo(*key, **variant), self.solo(*key, exact=True)
        return compare_results(solo.losses, solo.adapter, exact.losses, exact.adapter, exact.initial_adapter)

    def assert_same(self, differences: Mapping[str, Difference], case: Case) -> None:
        """All tasks of a run of ``case`` are as near to a reference as its dtype and backbone allow.

        Args:
            differences: By task id.
            case: What was run.
        """
        limits = {task_id: self.limit(case, task_id) for task_id in differences}
        beyond = {
            task_id: f"{each}, expected {limits[task_id]}"
            for task_id, each in differences.items()
            if not each.share_of(limits[task_id]) <= 1  # nor may it be a NaN
        }
        assert not beyond, f"{case}: {beyond}"


def _plan_as_written(case: Case, workload: Workload, model: ModelSpec) -> Plan:
    assert case.partition is not None, "there is no policy to choose one"
    return make_plan(
        workload,
        model,
        partition=[group.split("+") for group in case.partition.split(",")],
        alignment=case.alignment,
        chunk_tokens=case.chunk_tokens,
        template=case.template,
        carry=case.carry,
        tp=case.tp,
        pp=case.pp,
        dp=case.dp,
    )


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
