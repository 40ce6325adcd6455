"""All policies on one workload: predicted, and if asked for really executed one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from muxtune.costs.ref import CostsRef
from muxtune.plan import Parallelism, Plan, Predicted, load_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import UserError
from muxtune.support.processes import keeping
from muxtune.support.tables import format_table, show_bytes, show_percent, show_rate, show_seconds

if TYPE_CHECKING:
    from muxtune.policies import Policy

__all__ = [
    "BASELINE",
    "Comparison",
    "Measured",
    "PolicyResult",
    "compare_results",
    "comparison_table",
    "measure_plan",
    "policy_result",
    "run_comparison",
]

BASELINE = "nemo"
"""Policy that speed-ups are relative to, if it has a plan."""

_OTHER_BASELINES = ("hf-peft", "sl-peft")
"""The paper's others, for where the copies of the backbone of ``nemo`` do not fit."""


class Measured(BaseModel):
    """What a run of a policy's plan took; medians over its steady iterations."""

    model_config = ConfigDict(frozen=True)

    run_dir: Path
    steps: int
    iteration_s: float
    tokens_per_s: float
    billed_tokens_per_s: float
    effective_tokens_per_s: float
    backbone_bytes: tuple[int, ...]
    """Per stage, all instances."""
    peak_memory_bytes: tuple[int, ...]
    """Peak memory of each stage."""


class PolicyResult(BaseModel):
    """One policy on the workload."""

    model_config = ConfigDict(frozen=True)

    policy: str
    """Policy, or the name of a plan's file where plans are compared."""
    refused: str | None = None
    """Why it has no plan (out of memory, say); then it has no numbers."""
    costs: CostsRef | None = None
    """Costs that it is predicted by."""
    parallelism: Parallelism | None = None
    idle_ranks: int | None = None
    """Ranks of the cluster that it leaves idle."""
    htasks: tuple[tuple[str, ...], ...] = ()
    """Tasks of each hTask."""
    template: str | None = None
    predicted: Predicted | None = None
    measured: Measured | None = None


class Comparison(BaseModel):
    """What ``muxtune compare --json`` prints."""

    model_config = ConfigDict(frozen=True)

    compared: Literal["policy", "plan"] = "policy"
    """What stands side by side: policies on one workload, or plans as they are."""
    baseline: str
    """The first with a plan of ``nemo``, ``hf-peft`` and ``sl-peft``; where plans are compared, the first."""
    device_memory_bytes: int | None = None
    """What each rank has."""
    policies: tuple[PolicyResult, ...]
    predicted_speedup: dict[str, float]
    """Per policy, effective tokens/s relative to the baseline's; empty without the baseline."""
    measured_speedup: dict[str, float]
    """Speedup of the real runs, measured in the same way."""


def run_comparison(
    problem: PlanningProblem,
    policies: Sequence[str | Policy],
    *,
    measure_dir: Path | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Plan a workload under several policies.

    Args:
        problem: Tasks with their data, backbone, cluster and costs.
        policies: Names of the policy registry, or objects that are policies.
        measure_dir: Execute every plan for real, each into a folder of its policy's name in here.
        steps: Steps of each run; all by default.
        progress: Show a bar for each run.

    Raises:
        UserError: An unknown policy, or none of them has a plan.
        RunError: A real execution failed.
        Stopped: A signal came that :func:`muxtune.support.processes.stoppable` waits for.
    """
    plans = dict(_plan_or_reason(problem, policy) for policy in policies)
    if all(isinstance(plan, str) for plan in plans.values()):
        raise UserError("no policy has a plan: " + "; ".join(f"{name}: {why}" for name, why in plans.items()))
    results = []
    for policy, plan in plans.items():
        if isinstance(plan, str):
            results.append(PolicyResult(policy=policy, refused=plan))
            continue
        measured = None
        if measure_dir is not None:
            with keeping(partial(_kept, measure_dir, [r for r in results if r.measured is not None])):
                measured = measure_plan(plan, measure_dir / policy, steps=steps, progress=progress)
        results.append(policy_result(plan, measured))
    return compare_results(results, device_memory_bytes=problem.cluster.device.memory_bytes)


def compare_plan_files(paths: Sequence[Path]) -> Comparison:
    """Hold plans side by side as they are, each under the name of its file, against the first.

    Raises:
        UserError: A plan cannot be read.
    """
    plans = [load_plan(path) for path in paths]
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    results = [
        policy_result(plan).model_copy(update={"policy": name})
        for name, plan in zip(names, plans, strict=True)
    ]
    memory = {plan.cluster.device.memory_bytes for plan in plans}
    return compare_results(
        results, compared="plan", device_memory_bytes=memory.pop() if len(memory) == 1 else None
    )


def _kept(measure_dir: Path, measured: Sequence[PolicyResult]) -> str:
    runs = ", ".join(result.policy for result in measured) or "of no policy yet"
    return f"the finished runs ({runs}) are kept in {measure_dir}; a new comparison needs another folder"


def measure_plan(plan: Plan, run_dir: Path, *, steps: int | None, progress: bool = False) -> Measured:
    """Execute a plan for real.

    Raises:
        UserError: The folder holds another run.
        RunError: The execution failed.
    """
    from runtime import RunOptions, run_plan

    report = run_plan(plan, run_dir, RunOptions(steps=steps, progress=progress))
    return Measured(
        run_dir=run_dir,
        steps=report.steps,
        iteration_s=report.median_iteration_s,
        tokens_per_s=report.tokens_per_s,
        billed_tokens_per_s=report.billed_tokens_per_s,
        effective_tokens_per_s=report.effective_tokens_per_s,
        backbone_bytes=tuple(stage.backbone_bytes for stage in report.memory),
        peak_memory_bytes=tuple(stage.peak_bytes for stage in report.memory),
    )


def policy_result(plan: Plan, measured: Measured | None = None) -> PolicyResult:
    """A policy's plan and, if there was one, its run."""
    return PolicyResult(
        policy=plan.policy,
        costs=plan.costs,
        parallelism=plan.parallelism,
        idle_ranks=plan.idle_ranks,
        htasks=tuple(htask.task_ids for htask in plan.htasks),
        template=plan.template,
        predicted=plan.predicted,
        measured=measured,
    )


def compare_results(
    results: Sequence[PolicyResult],
    *,
    compared: Literal["policy", "plan"] = "policy",
    device_memory_bytes: int | None = None,
) -> Comparison:
    """Set results in relation to the baseline's."""
    planned = {result.policy for result in results if result.predicted is not None}
    candidates = (BASELINE, *_OTHER_BASELINES) if compared == "policy" else (results[0].policy,)
    baseline = next((name for name in candidates if name in planned), BASELINE)
    return Comparison(
        compared=compared,
        baseline=baseline,
        device_memory_bytes=device_memory_bytes,
        policies=tuple(results),
        predicted_speedup=_speedups(baseline, {r.policy: r.predicted for r in results}),
        measured_speedup=_speedups(baseline, {r.policy: r.measured for r in results}),
    )


def comparison_table(comparison: Comparison) -> str:
    """One row per policy, predictions beside measurements where there are any.

    A policy without a plan is a row that says so; the reasons stand below.
    """
    measured = any(r.measured for r in comparison.policies)
    against = f"vs {comparison.baseline}"
    header = [comparison.compared, "iteration", "effective", against, "memory"]
    if measured:
        header += ["measured", "effective", against, "memory"]
    header += ["tp x pp x dp", "hTasks", "template", "tokens/s", "bubble", "MFU"]
    rows = []
    notes = []
    marks = (result.costs.mark for result in comparison.policies if result.costs is not None)
    notes += [f"predicted {mark}" for mark in dict.fromkeys(marks) if mark is not None]
    for result in comparison.policies:
        if result.refused is not None:
            notes.append(f"{result.policy} has no plan: {result.refused}")
        row = _predicted_cells(result, comparison)
        if measured:
            row += _measured_cells(result, comparison)
        rows.append([result.policy, *row, *_plan_cells(result)])
    return "\n".join([format_table(header, rows), *notes])


def _predicted_cells(result: PolicyResult, comparison: Comparison) -> list[str]:
    p = result.predicted
    if p is None:
        return ["no plan", *["-"] * 3]
    return [
        show_seconds(p.iteration_s),
        show_rate(p.effective_tokens_per_s),
        _show_speedup(comparison.predicted_speedup, result.policy),
        show_bytes(max(p.peak_memory_bytes)),
    ]


def _plan_cells(result: PolicyResult) -> list[str]:
    """What is interesting about a plan beside what it gives; a narrow terminal leaves this out."""
    p, mesh = result.predicted, result.parallelism
    if p is None or mesh is None:
        return ["-"] * 6
    return [
        f"{mesh.tp} x {mesh.pp} x {mesh.dp}" + (f", {result.idle_ranks} idle" if result.idle_ranks else ""),
        str(len(result.htasks)),
        str(result.template),
        show_rate(p.tokens_per_s),
        show_percent(p.bubble_fraction),
        "unknown" if p.mfu is None else show_percent(p.mfu),
    ]


def _measured_cells(result: PolicyResult, comparison: Comparison) -> list[str]:
    m = result.measured
    if m is None:
        return ["-"] * 4
    return [
        show_seconds(m.iteration_s),
        show_rate(m.effective_tokens_per_s),
        _show_speedup(comparison.measured_speedup, result.policy),
        show_bytes(max(m.peak_memory_bytes)),
    ]


def _plan_or_reason(problem: PlanningProblem, policy: str | Policy) -> tuple[str, Plan | str]:
    """Name of the policy, and its plan or why it has none."""
    from muxtune.policies import choose_policy
    from muxtune.support.registry import PluginError
    from sim.search import search_problem

    try:
        name = choose_policy(policy).name  # an unknown one is no result
    except PluginError as error:
        return str(policy), str(error)
    try:
        return name, search_problem(problem, policy=policy)
    except UserError as error:  # this policy cannot; the others may
        return name, str(error)


def _speedups(baseline: str, rates: Mapping[str, Predicted | Measured | None]) -> dict[str, float]:
    base = rates.get(baseline)
    if base is None:
        return {}
    return {
        policy: rate.effective_tokens_per_s / base.effective_tokens_per_s
        for policy, rate in rates.items()
        if rate is not None
    }


def _show_speedup(speedups: dict[str, float], policy: str) -> str:
    return f"{speedups[policy]:.2f}x" if policy in speedups else "-"
