"""Was the prediction right, and are the results those of each task trained alone?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from muxtune.costs.ref import CostsRef
from muxtune.model import ModelSpec
from muxtune.plan import Plan, check_backbone, check_plan, check_recorded, load_plan
from muxtune.schedule import load_trace
from muxtune.support.errors import UserError
from muxtune.tasks import PeftTask
from muxtune.validation import (
    ClassComparison,
    Comparison,
    IterationComparison,
    IterationExplanation,
    SlowIteration,
    StageComparison,
    compare,
    compare_run,
    explain_difference,
    read_run,
)
from runtime.data.feed import load_plan_data
from runtime.reports.report import RunReport, load_report
from runtime.reports.solo import SoloResult, train_solo
from runtime.reports.spread import DRAWS, Agreement, Distance, bound_of, judge, largest, needs_spread
from runtime.tasks.adapter_files import load_adapter
from runtime.tasks.outputs import ADAPTER, load_losses, load_status, task_folder

_STRICT = ConfigDict(frozen=True, extra="forbid")


class TaskValidation(BaseModel):
    """One task against its solo run."""

    model_config = _STRICT

    task_id: str
    steps: int
    """Steps that the run did."""
    first_loss: float
    last_loss: float
    solo_steps: int
    """Steps that the reference did."""
    loss_difference: float | None
    """Largest relative difference of a step's loss to the solo run's; null without a solo run."""
    loss_spread: float | None = None
    """Largest relative difference of a loss between solo runs that differ in rounding alone; null in float64,
    which needs none."""
    loss_bound: float | None = None
    """What the difference may be, see :mod:`runtime.reports.spread`."""
    adapter_error: float | None
    """Relative error of the adapter's update, ||(A - A0) - (S - S0)|| / ||S - S0||; null if not all of the
    run's steps were repeated alone."""
    adapter_spread: float | None = None
    """Relative error of the adapter's update between these solo runs; null like the error."""
    adapter_bound: float | None = None
    """Largest error that is allowed; null like the error."""
    agreement: Agreement | None = None
    """Whether both are within their bounds; ``undecided`` where solo runs are themselves so far apart, or not
    finite, that the bounds allow anything; null without a solo run."""


class ValidationReport(BaseModel):
    """What ``muxtune validate --json`` prints."""

    model_config = _STRICT

    comparable: bool
    """Whether it ran on the kind of device that it was planned for; else its times say nothing of the
    prediction."""
    costs: CostsRef
    """Costs that the predicted times are by; of estimates, with their usual error."""
    predicted_iteration_s: float
    measured_iteration_s: float
    iteration_error: float
    """(predicted - measured) / measured."""
    predicted_effective_tokens_per_s: float
    measured_effective_tokens_per_s: float
    busy_s: tuple[Comparison, ...]
    """Per stage, computing time in one iteration."""
    fwd_s: tuple[tuple[Comparison, ...], ...]
    """[stage][hTask], per micro-batch."""
    bwd_s: tuple[tuple[Comparison, ...], ...]
    """[stage][hTask], per micro-batch, with its share of the optimizer step."""
    peak_memory_bytes: tuple[Comparison, ...]
    """Peak memory of each stage."""
    max_loss_difference: float | None
    """Largest ``loss_difference`` of all tasks; null without solo runs."""
    tasks: tuple[TaskValidation, ...]
    explanation: IterationExplanation
    """Parts of the difference between measured and predicted iteration time."""
    classes: tuple[ClassComparison, ...]
    """Seconds per kind of action, stage and hTask."""
    stages: tuple[StageComparison, ...]
    """What each stage does in a steady iteration."""
    iterations: tuple[IterationComparison, ...]
    """Iterations of the last start of the run."""
    slowest_iteration: SlowIteration
    """Slowest of the steady iterations."""


def validate_run(plan: Plan | Path, run_dir: Path, *, solo_steps: int | None = None) -> ValidationReport:
    """Compare a finished run with its plan's prediction and with each task trained alone.

    Args:
        plan: Plan that was run, or its file.
        run_dir: Folder of the finished run.
        solo_steps: Steps of each task to repeat alone with Hugging Face peft; by default all that the run
            did, 0 for none.

    Raises:
        UserError: The run is not finished, is one of another plan, or its trace does not show it.
    """
    if isinstance(plan, Path):
        plan = load_plan(plan)
    else:
        check_plan(plan)
    if load_plan(run_dir / "plan.json") != plan:
        raise UserError(f"{run_dir} has a run of another plan; expected the plan in {run_dir / 'plan.json'}")
    if solo_steps != 0:  # nothing else reads it
        check_backbone(plan, str(run_dir / "plan.json"))
        check_recorded(plan, run_dir)
    report = load_report(run_dir / "run.json")
    predicted = plan.predicted
    run = read_run(plan, load_trace(run_dir / "trace.json"), report.steady_steps)
    tables = compare_run(run)
    tasks = _validate_tasks(plan, run_dir, solo_steps)
    differences = [task.loss_difference for task in tasks if task.loss_difference is not None]
    return ValidationReport(
        comparable=report.device == plan.cluster.device.kind,
        costs=plan.costs,
        predicted_iteration_s=predicted.iteration_s,
        measured_iteration_s=report.median_iteration_s,
        iteration_error=predicted.iteration_s / report.median_iteration_s - 1,
        predicted_effective_tokens_per_s=predicted.effective_tokens_per_s,
        measured_effective_tokens_per_s=report.effective_tokens_per_s,
        busy_s=_compare_busy(plan, report),
        fwd_s=_compare_table(predicted.fwd_s, report.fwd_s),
        bwd_s=_compare_table(predicted.bwd_s, _backward_with_step(plan, report)),
        peak_memory_bytes=tuple(
            compare(p, m.peak_bytes) for p, m in zip(predicted.peak_memory_bytes, report.memory, strict=True)
        ),
        max_loss_difference=max(differences, default=None),
        tasks=tasks,
        explanation=explain_difference(
            run, predicted_s=predicted.iteration_s, measured_s=report.median_iteration_s
        ),
        classes=tables.classes,
        stages=tables.stages,
        iterations=tables.iterations,
        slowest_iteration=tables.slowest,
    )


def _compare_table(
    predicted: tuple[tuple[float, ...], ...], measured: tuple[tuple[float, ...], ...]
) -> tuple[tuple[Comparison, ...], ...]:
    return tuple(
        tuple(compare(p, m) for p, m in zip(p_row, m_row, strict=True))
        for p_row, m_row in zip(predicted, measured, strict=True)
    )


def _compare_busy(plan: Plan, report: RunReport) -> tuple[Comparison, ...]:
    predicted = (
        sum(m * (f + b) for m, f, b in zip(plan.microbatches, fwd, bwd, strict=True))
        for fwd, bwd in zip(plan.predicted.fwd_s, plan.predicted.bwd_s, strict=True)
    )
    return tuple(compare(p, m) for p, m in zip(predicted, report.busy_s, strict=True))


def _backward_with_step(plan: Plan, report: RunReport) -> tuple[tuple[float, ...], ...]:
    """The prediction spreads the optimizer step over the micro-batches' backwards; so do we here."""
    return tuple(
        tuple(b + step / m for b, step, m in zip(bwd, steps, plan.microbatches, strict=True))
        for bwd, steps in zip(report.bwd_s, report.step_s, strict=True)
    )


def _validate_tasks(plan: Plan, run_dir: Path, solo_steps: int | None) -> tuple[TaskValidation, ...]:
    if solo_steps == 0:
        return tuple(
            _validate_task(task, load_losses(run_dir, task.id), None, run_dir, plan.model)
            for task in plan.tasks
            if load_losses(run_dir, task.id)
        )
    data = load_plan_data(plan)
    validations = []
    for task in plan.tasks:
        losses = load_losses(run_dir, task.id)
        if not losses:  # it failed at once
            continue
        steps = len(losses) if solo_steps is None else min(solo_steps, len(losses))
        solo = train_solo(plan.model, data[task.id], steps)
        again: list[SoloResult] = []
        while True:
            if needs_spread(plan.model):
                again.append(train_solo(plan.model, data[task.id], steps, draw=len(again) + 1))
            validation = _validate_task(task, losses, solo, run_dir, plan.model, again)
            if validation.agreement != "beyond" or not again or len(again) == DRAWS:
                break
        validations.append(validation)
    return tuple(validations)


def _validate_task(
    task: PeftTask,
    losses: list[float],
    solo: SoloResult | None,
    run_dir: Path,
    model: ModelSpec,
    again: Sequence[SoloResult] = (),
) -> TaskValidation:
    found = bound = spread = None
    status = load_status(run_dir, task.id)
    failed = status is not None and status.state == "failed"  # its adapter is of an earlier step
    whole = solo is not None and len(solo.losses) == len(losses) and not failed
    if solo is not None:
        adapter = load_adapter(task_folder(run_dir, task.id) / ADAPTER) if whole else None
        found = distance_of(losses, adapter, solo)
        if again:
            spread = largest([distance_of(each.losses, each.adapter, solo) for each in again])
        bound = bound_of(model, task.peft, spread)
    return TaskValidation(
        task_id=task.id,
        steps=len(losses),
        first_loss=losses[0],
        last_loss=losses[-1],
        solo_steps=0 if solo is None else len(solo.losses),
        loss_difference=None if found is None else found.loss,
        loss_spread=None if spread is None else spread.loss,
        loss_bound=None if bound is None else bound.loss,
        adapter_error=None if found is None else found.update,
        adapter_spread=spread.update if spread is not None and whole else None,
        adapter_bound=bound.update if bound is not None and whole else None,
        agreement=None if found is None or bound is None else judge(found, bound),
    )


def distance_of(losses: list[float], adapter: Mapping[str, Tensor] | None, solo: SoloResult) -> Distance:
    """Distance of a training to the solo run, over the steps of the latter."""
    differences = [
        abs(own - alone) / abs(alone) if alone else abs(own)
        for own, alone in zip(losses, solo.losses, strict=False)
    ]
    largest = float("nan") if any(map(math.isnan, differences)) else max(differences)
    update = None if adapter is None else update_error(adapter, solo.adapter, solo.initial_adapter)
    return Distance(largest, update)


def update_error(
    adapter: Mapping[str, Tensor], reference: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> float:
    """Relative error of an update, over all tensors of an adapter.

    Both start from ``initial``, so ``||adapter - reference|| / ||reference - initial||``.

    Raises:
        UserError: They are not adapters of the same modules.
    """
    if adapter.keys() != reference.keys():
        odd = sorted(adapter.keys() ^ reference.keys())[0]
        raise UserError(f"the adapter's tensors differ from the solo run's, first {odd!r}")
    squared = sum(float((adapter[k] - reference[k]).double().square().sum()) for k in reference)
    update = sum(float((reference[k] - initial[k]).double().square().sum()) for k in reference)
    return float((squared / update) ** 0.5) if update else float(squared**0.5)
