"""``muxtune demo``: profile, plan, simulate, run, validate and compare on this machine, with no flags."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from experiments.comparison import (
    BASELINE,
    Comparison,
    Measured,
    PolicyResult,
    compare_results,
    measure_plan,
    policy_result,
)
from experiments.demo_texts import DEMO_DATASETS, write_demo_texts
from experiments.gantt import draw_plan
from muxtune.cluster import load_cluster
from muxtune.costs.kept import kept_profile_path
from muxtune.costs.needs import needed_kinds
from muxtune.costs.profile import save_profile
from muxtune.costs.profiled import ProfiledCosts
from muxtune.model import load_model_spec
from muxtune.plan import Plan, Predicted, save_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import save_trace
from muxtune.support.errors import SpecError
from muxtune.support.files import write_text_atomically
from muxtune.support.invocation import program_name
from muxtune.support.processes import keeping
from muxtune.support.tables import format_table, show_bytes, show_difference, show_rate, show_seconds
from muxtune.tasks import load_workload
from runtime import ValidationReport
from runtime.reports.validate import TaskValidation

__all__ = ["DemoReport", "run_demo"]

MODEL = "llama-tiny"
CLUSTER = "cpu-2"
STEPS = 60
"""Optimizer steps of every task."""
BASELINE_STEPS = 10
"""Iterations of the baseline, which is only there to be timed."""
SOLO_STEPS = 3
"""Steps of each task that are repeated with transformers and peft alone."""

_MARKER = ".muxtune-demo"
"""A folder with this file was made here, and may be replaced."""

_TASKS: dict[str, dict[str, Any]] = {
    "add": {"r": 8, "targets": ["q_proj", "v_proj"], "batch": (16, 4)},
    "subtract": {"r": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "batch": (32, 8)},
    "date_quarter": {"r": 4, "targets": ["q_proj", "v_proj"], "batch": (16, 4)},
    "date_iso": {"r": 32, "targets": ["all-linear"], "batch": (16, 4)},
    "sort_words": {"r": 16, "targets": ["all-linear"], "batch": (8, 2)},
    "sort_first": {"r": 8, "targets": ["gate_proj", "up_proj", "down_proj"], "batch": (16, 4)},
    "table_lookup": {"r": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "batch": (8, 2)},
    "table_maximum": {"r": 8, "targets": ["q_proj", "v_proj"], "batch": (8, 2)},
}
"""What differs between the tenants; ``batch`` is (global, micro)."""


class DemoReport(BaseModel):
    """Everything that the demonstration found; ``report.json``."""

    model_config = ConfigDict(frozen=True)

    out: Path
    model: str
    cluster: str
    seconds: dict[str, float]
    """Seconds of each station of the loop."""
    comparison: Comparison
    validation: ValidationReport

    @property
    def next_commands(self) -> tuple[str, ...]:
        """Commands that go on from here: all policies on the same tasks, another plan, and its run."""
        workload, plan = (shlex.quote(str(self.out / name)) for name in ("workload.yaml", "plan-2.json"))
        run = shlex.quote(str(self.out / "run-2"))
        steps = min(10, max(task.steps for task in self.validation.tasks))
        return (
            f"compare --workload {workload}",
            f"plan --workload {workload} --policy temporal-only --out {plan}",
            f"run {plan} --out {run} --steps {steps}",
        )

    def to_markdown(self) -> str:
        """Tables for people; ``report.md``."""
        ours, theirs = self.comparison.policies
        speedup = self.comparison.measured_speedup[ours.policy]
        fused = "; ".join(" + ".join(group) for group in ours.htasks)
        stations = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return "\n".join(
            [
                f"# MuxTune demo: {len(self.validation.tasks)} LoRA tasks on {self.model}, {self.cluster}",
                "",
                f"hTasks of {ours.policy} ({ours.template} template): {fused}.",
                "",
                _numbers_table(ours, theirs),
                "",
                f"{ours.policy} against {theirs.policy} (one instance per task, 1F1B), both executed: "
                f"{speedup:.2f}x effective tokens/s (predicted "
                f"{self.comparison.predicted_speedup[ours.policy]:.2f}x).",
                "Losses are compared with those of each task trained alone with transformers and peft.",
                "",
                _task_table(self.validation.tasks),
                "",
                f"{sum(self.seconds.values()):.0f} s in all: {stations}.",
                f"In {self.out}: gantt.png (simulated above measured), gantt-{theirs.policy}.png, plan.json, "
                f"run/, report.json.",
                "",
                "What to type next:",
                "",
                *(f"    {program_name()} {words}" for words in self.next_commands),
            ]
        )


def run_demo(
    out: Path = Path("runs/demo"),
    *,
    steps: int = STEPS,
    baseline_steps: int = BASELINE_STEPS,
    solo_steps: int = SOLO_STEPS,
) -> DemoReport:
    """The whole loop with eight made-up tenants, in minutes on two cores.

    Args:
        out: Folder for everything; that of an earlier demo is replaced.
        steps: Optimizer steps of every task.
        baseline_steps: Iterations of the baseline's run.
        solo_steps: Steps of each task that are compared with its solo run.

    Raises:
        SpecError: ``out`` holds something else than an earlier demo.
        Stopped: A signal came that :func:`muxtune.support.processes.stoppable` waits for.
    """
    _prepare(out)
    clock = _Stations()
    with keeping(lambda: f"{clock.so_far()} kept in {out}; the same command begins anew"):
        return _loop(out, clock, steps=steps, baseline_steps=baseline_steps, solo_steps=solo_steps)


def _loop(out: Path, clock: _Stations, *, steps: int, baseline_steps: int, solo_steps: int) -> DemoReport:
    with clock.station("texts"):
        workload = load_workload(_write_workload(out, steps))
    model, cluster = load_model_spec(MODEL), load_cluster(CLUSTER)
    with clock.station("profile"):
        from profiler import profile_model

        profile = profile_model(
            model,
            device="cpu",
            out=kept_profile_path(model, cluster.ranks),  # which later commands find
            ranks=cluster.ranks,
            kinds=needed_kinds((task.peft for task in workload.tasks), model),
            progress=True,
        )
        save_profile(profile, out / "profile.parquet")
    with clock.station("plan and simulate"):
        from sim.search import search_problem

        problem = PlanningProblem(workload, model, cluster, ProfiledCosts(profile, model))
        plan = search_problem(problem)
        baseline = search_problem(problem, policy=BASELINE)
        _save(plan, out / "plan.json", out / "trace-simulated.json")
        save_plan(baseline, out / f"plan-{BASELINE}.json")
    with clock.station("run"):
        measured = measure_plan(plan, out / "run", steps=None, progress=True)
    with clock.station(f"run {BASELINE}"):
        run_dir = out / f"run-{BASELINE}"
        baseline_measured = measure_plan(baseline, run_dir, steps=min(baseline_steps, steps), progress=True)
    with clock.station("validate"):
        from runtime import validate_run

        validation = validate_run(plan, out / "run", solo_steps=min(solo_steps, steps))
    with clock.station("draw"):
        draw_plan(plan, out / "gantt.png", run_dir=out / "run")
        draw_plan(baseline, out / f"gantt-{BASELINE}.png", run_dir=run_dir)
    report = DemoReport(
        out=out,
        model=model.name,
        cluster=cluster.name,
        seconds=clock.seconds,
        comparison=compare_results(
            [policy_result(plan, measured), policy_result(baseline, baseline_measured)]
        ),
        validation=validation,
    )
    write_text_atomically(out / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text_atomically(out / "report.md", report.to_markdown() + "\n")
    return report


def _prepare(out: Path) -> None:
    out = out.resolve()  # a link stays one
    if out.exists() and not out.is_dir():
        raise SpecError("--out", str(out), "a folder")
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise SpecError("--out", str(out), "a new or empty folder, or that of an earlier demo")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _write_workload(out: Path, steps: int) -> Path:
    paths = write_demo_texts(out / "texts")
    tasks = [
        {
            "id": name.replace("_", "-"),
            "peft": {
                "method": "lora",
                "r": choice["r"],
                "alpha": 2 * choice["r"],
                "targets": choice["targets"],
            },
            "dataset": {"path": str(paths[name].relative_to(out))},
            "global_batch_size": choice["batch"][0],
            "micro_batch_size": choice["batch"][1],
            "max_length": DEMO_DATASETS[name].max_tokens,
            "learning_rate": 5e-3,
            "steps": steps,
        }
        for name, choice in _TASKS.items()
    ]
    path = out / "workload.yaml"
    path.write_text(yaml.safe_dump({"backbone": MODEL, "tasks": tasks}, sort_keys=False))
    return path


def _save(plan: Plan, plan_path: Path, trace_path: Path) -> None:
    from sim import simulate_plan

    save_plan(plan, plan_path)
    save_trace(trace_path, simulate_plan(plan).spans, "simulated")


def _numbers_table(*results: PolicyResult) -> str:
    header = [""]
    columns: list[list[str]] = []
    for result in results:
        assert result.predicted is not None
        assert result.measured is not None
        header += [f"{result.policy} predicted", "measured", "difference"]
        columns += _compared(result.predicted, result.measured)
    names = [
        "iteration",
        "tokens/s",
        "effective tokens/s",
        "memory, fullest stage",
        "backbone, fullest stage",
    ]
    return format_table(header, [list(row) for row in zip(names, *columns, strict=True)])


def _compared(predicted: Predicted, measured: Measured) -> list[list[str]]:
    pairs = [
        (predicted.iteration_s, measured.iteration_s, show_seconds),
        (predicted.tokens_per_s, measured.tokens_per_s, show_rate),
        (predicted.effective_tokens_per_s, measured.effective_tokens_per_s, show_rate),
        (max(predicted.peak_memory_bytes), max(measured.peak_memory_bytes), show_bytes),
    ]
    return [
        [*(show(ours) for ours, _, show in pairs), "-"],
        [*(show(theirs) for _, theirs, show in pairs), show_bytes(max(measured.backbone_bytes))],
        [*(show_difference(ours, theirs) for ours, theirs, _ in pairs), "-"],
    ]


def _task_table(tasks: Sequence[TaskValidation]) -> str:
    header = ["task", "steps", "first loss", "last loss", "solo steps", "difference to solo"]
    rows = [
        [
            task.task_id,
            str(task.steps),
            f"{task.first_loss:.3f}",
            f"{task.last_loss:.3f}",
            str(task.solo_steps),
            "-" if task.loss_difference is None else f"{task.loss_difference:.1e}",
        ]
        for task in tasks
    ]
    return format_table(header, rows)


class _Stations:
    """Seconds of each part of the loop; says on stderr where it stands."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def so_far(self) -> str:
        """What has been done, as the subject of a sentence."""
        done = ", ".join(self.seconds)
        return f"what is finished ({done}) is" if done else "nothing is finished, and nothing is"

    @contextmanager
    def station(self, name: str) -> Iterator[None]:
        sys.stderr.write(f"demo: {name}\n")
        start_s = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start_s
