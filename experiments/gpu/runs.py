"""Whole runs of a plan on GPUs against the same plan on processors, in float32."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.gpu.report import Section
from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.support.tables import format_table, show_bytes, show_seconds
from muxtune.tasks import Workload, workload_from

if TYPE_CHECKING:
    from runtime import RunReport

MODEL = "llama-tiny"
STEPS = 3

LOSS_TOLERANCE = 1e-4
"""Largest relative error of a step's loss; that of a micro-batch in the parity check."""
UPDATE_TOLERANCE = 1e-2
"""Largest relative error of an adapter's update. AdamW divides by the size of a gradient, so the first steps
of elements whose gradient is nearly rounding go either way."""


@dataclass(frozen=True, slots=True)
class RunCase:
    """A mesh that a small plan is made for."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        """GPUs that it takes."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp={self.tp}, pp={self.pp}, dp={self.dp}"


CASES = (RunCase(), RunCase(pp=2), RunCase(tp=2), RunCase(dp=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How far a run on a device is from that on processors."""

    case: RunCase
    loss_error: float
    """Largest relative error of a loss, of all tasks and steps."""
    update_error: float
    """Largest relative error of an adapter's update, of all tasks."""
    iteration_s: float
    peak_bytes: int | None
    """Most bytes that a GPU's allocator gave out, on the fullest stage."""
    counted_bytes: int
    """Bytes that the run counted there."""

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerances; a NaN is not."""
        return self.loss_error <= LOSS_TOLERANCE and self.update_error <= UPDATE_TOLERANCE


def run_cases(device: Literal["cpu", "cuda"], devices: int) -> list[RunCase]:
    """Meshes that fit so many devices; on processors, which only try the check, the smallest."""
    return [case for case in CASES if case.ranks <= (1 if device == "cpu" else devices)]


def make_plan(case: RunCase) -> Plan:
    """The plan for A100s, whatever GPUs there are."""
    model = load_model_spec(MODEL, "float32")
    cluster = load_cluster(f"a100-{case.ranks}")
    costs = AnalyticCosts("a100", model, interconnect_of(cluster))
    options = PlanOptions(tp=case.tp, pp=case.pp, dp=case.dp)
    return plan_workload(_workload(), model, cluster, costs, options=options)[0]


def _workload() -> Workload:
    choices = (("sst2", 4, 64), ("openbookqa", 8, 96), ("rte", 16, 128))
    tasks = [
        {
            "id": histogram,
            "peft": {"method": "lora", "r": r, "alpha": 2 * r, "targets": ["all-linear"]},
            "dataset": {"lengths": histogram},
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_length": max_length,
            "learning_rate": 1e-3,
            "max_grad_norm": None if histogram == "rte" else 0.5,
            "steps": STEPS,
        }
        for histogram, r, max_length in choices
    ]
    return workload_from({"tasks": tasks}, "tasks of the run check", Path())


def check_run(
    case: RunCase,
    *,
    device: Literal["cpu", "cuda"],
    run: Callable[[Plan, Path, Literal["cpu", "cuda"]], RunReport] | None = None,
) -> RunResult:
    """Run a plan on a device and on processors.

    Args:
        case: Case, which has the mesh.
        device: Device to check; ``cpu`` compares processors with themselves.
        run: Executes a plan into a folder; :func:`runtime.run_plan` by default.
    """
    plan = make_plan(case)
    run = _run_plan if run is None else run
    with tempfile.TemporaryDirectory() as folder:
        tried, right = Path(folder, "tried"), Path(folder, "right")
        report = run(plan, tried, device)
        run(plan, right, "cpu")
        errors = [_errors(task.id, tried, right) for task in plan.tasks]
    fullest = max(report.memory, key=lambda memory: memory.peak_bytes)
    return RunResult(
        case=case,
        loss_error=max(loss for loss, _ in errors),
        update_error=max(update for _, update in errors),
        iteration_s=report.median_iteration_s,
        peak_bytes=fullest.device_peak_bytes,
        counted_bytes=fullest.peak_bytes,
    )


def _run_plan(plan: Plan, out_dir: Path, device: Literal["cpu", "cuda"]) -> RunReport:
    from runtime import RunOptions, run_plan

    return run_plan(plan, out_dir, RunOptions(device=device))


def _errors(task_id: str, tried: Path, right: Path) -> tuple[float, float]:
    from runtime.reports.validate import update_error
    from runtime.tasks.adapter_files import load_adapter
    from runtime.tasks.outputs import ADAPTER, ADAPTER_INIT, load_losses, task_folder

    pairs = zip(load_losses(tried, task_id), load_losses(right, task_id), strict=True)
    initial, reference, adapter = (
        load_adapter(task_folder(run, task_id) / name)
        for run, name in ((right, ADAPTER_INIT), (right, ADAPTER), (tried, ADAPTER))
    )
    return largest_error(pairs), update_error(adapter, reference, initial)


def largest_error(pairs: Iterable[tuple[float, float]]) -> float:
    """Largest relative error of pairs of (found, right); NaN if one is."""
    errors = [abs(found - right) / abs(right) for found, right in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def runs_section(device: str) -> Section:
    """All meshes that the GPUs here allow."""
    import torch

    kind: Literal["cpu", "cuda"] = "cpu" if device == "cpu" else "cuda"
    results = []
    for case in run_cases(kind, torch.cuda.device_count()):
        results.append(check_run(case, device=kind))
        sys.stderr.write(f"gpu_check: run, {case}: {'ok' if results[-1].ok else 'FAILS'}\n")
    return describe_runs(results)


def describe_runs(results: Iterable[RunResult]) -> Section:
    """Results as a section of the report."""
    results = list(results)
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} plans differ" if failed else f"all {len(results)} plans agree"
    rows = [
        [
            str(result.case),
            f"{result.loss_error:.1e}",
            f"{result.update_error:.1e}",
            show_seconds(result.iteration_s),
            "-" if result.peak_bytes is None else show_bytes(result.peak_bytes),
            show_bytes(result.counted_bytes),
            "ok" if result.ok else "FAILS",
        ]
        for result in results
    ]
    table = format_table(["mesh", "loss", "update", "iteration", "allocator's peak", "counted", ""], rows)
    text = f"""\
`muxtune run` of a plan for A100s ({MODEL}, float32, three tasks, {STEPS} steps) on GPUs, and again with
`--device cpu`. Relative errors: of a step's loss (at most {LOSS_TOLERANCE:.0e}) and of an adapter's update
(at most {UPDATE_TOLERANCE:.0e}); the largest of each. Meshes of two ranks need two GPUs.

{table}"""
    return Section(title=f"Runs against the CPU: {verdict}", text=text, ok=not failed)
