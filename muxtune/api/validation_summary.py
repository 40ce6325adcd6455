"""What ``validate`` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from muxtune.support.tables import format_table, show_bytes, show_difference, show_rate, show_seconds

if TYPE_CHECKING:
    from muxtune.validation import (
        ClassComparison,
        Comparison,
        IterationComparison,
        IterationExplanation,
        SlowIteration,
        StageComparison,
    )
    from runtime import ValidationReport

_SMALL_SHARE = 0.005
"""Share of the measured iteration below which parts are shown as one."""

_NOT_COMPARABLE = (
    "The run was not on the kind of device that the plan is for: its times are not what was predicted."
)

_PLACES = {"in": "in", "before": "before", "message": "on the way of the message for"}


def validation_table(report: ValidationReport, *, details: bool = False) -> str:
    """Predictions beside measurements, what explains the difference, and every task beside its solo run.

    Args:
        report: The whole report.
        details: Also rows per hTask and per iteration.
    """
    tables = [_totals(report), _stage_table(report.stages)]
    if report.costs.mark is not None:
        tables.insert(0, f"The predicted times are {report.costs.mark}.")
    if not report.comparable:
        tables.insert(0, _NOT_COMPARABLE)
    if details:
        tables += [_class_table(report.classes), _iteration_table(report.iterations)]
    tables += [explanation_text(report.explanation, report.slowest_iteration), _task_table(report)]
    return "\n\n".join(tables)


def explanation_text(explanation: IterationExplanation, slowest: SlowIteration) -> str:
    """The parts of the difference, and where the slowest iteration lost its time."""
    small_s = _SMALL_SHARE * explanation.measured_s
    shown = [part for part in explanation.parts if abs(part.seconds) >= small_s or part.cause == "rest"]
    rows = [[_signed(part.seconds), part.meaning] for part in shown]
    if hidden := [part.seconds for part in explanation.parts if part not in shown]:
        rows.append(
            [_signed(sum(hidden)), f"{len(hidden)} parts below {_SMALL_SHARE:.1%} of an iteration each"]
        )
    head = (
        f"An iteration takes {show_seconds(explanation.measured_s)} (median), predicted "
        f"{show_seconds(explanation.predicted_s)}: {_signed(explanation.difference_s)}. That is:"
    )
    where = f"{_PLACES[slowest.place]} {slowest.action} on stage {slowest.stage}"
    lost = f"{where}, {_signed(slowest.place_excess_s)}"
    foot = (
        f"The slowest steady iteration, {slowest.step}, took {show_seconds(slowest.seconds)} "
        f"({_signed(slowest.excess_s)} to the median); most was lost {lost}."
    )
    return f"{head}\n\n{format_table(['part', 'what it is'], rows)}\n\n{foot}"


def _totals(report: ValidationReport) -> str:
    rows = [
        _compared("iteration", report.predicted_iteration_s, report.measured_iteration_s, show_seconds),
        _compared(
            "effective tokens/s",
            report.predicted_effective_tokens_per_s,
            report.measured_effective_tokens_per_s,
            show_rate,
        ),
    ]
    for stage, busy in enumerate(report.busy_s):
        rows.append(_compared(f"busy, stage {stage}", busy.predicted, busy.measured, show_seconds))
    for stage, peak in enumerate(report.peak_memory_bytes):
        rows.append(_compared(f"peak memory, stage {stage}", peak.predicted, peak.measured, show_bytes))
    return format_table(["", "predicted", "measured", "difference"], rows)


def _stage_table(stages: Sequence[StageComparison]) -> str:
    """What the stages do in a steady iteration, on average."""
    rows = []
    for stage in stages:
        kinds: dict[str, Comparison] = {
            "forward": stage.forward_s,
            "backward": stage.backward_s,
            "optimizer step": stage.step_s,
            "waiting": stage.waiting_s,
            "between actions": stage.between_s,
        }
        rows += [
            _compared(f"stage {stage.stage}, {name}", each.predicted, each.measured, show_seconds)
            for name, each in kinds.items()
        ]
    return format_table(["per iteration", "predicted", "measured", "difference"], rows)


def _class_table(classes: Sequence[ClassComparison]) -> str:
    rows = [
        [
            f"{row.kind}, stage {row.stage}, hTask {'+'.join(map(str, row.htasks))}",
            f"{row.per_iteration:g}",
            show_seconds(row.predicted_s),
            show_seconds(row.median_s),
            show_seconds(row.mean_s),
            show_difference(row.predicted_s, row.median_s) if row.predicted_s and row.median_s else "-",
        ]
        for row in classes
    ]
    return format_table(["action", "per iteration", "predicted", "median", "mean", "difference"], rows)


def _iteration_table(iterations: Sequence[IterationComparison]) -> str:
    rows = [
        _compared(
            f"iteration {row.step}{'' if row.steady else ' (not steady)'}",
            row.seconds.predicted,
            row.seconds.measured,
            show_seconds,
        )
        for row in iterations
    ]
    return format_table(["", "predicted", "measured", "difference"], rows)


def _task_table(report: ValidationReport) -> str:
    tasks = [
        [
            task.task_id,
            str(task.steps),
            f"{task.first_loss:.4f}",
            f"{task.last_loss:.4f}",
            str(task.solo_steps),
            _show_error(task.loss_difference, task.loss_bound),
            _show_error(task.adapter_error, task.adapter_bound),
            task.agreement or "-",
        ]
        for task in report.tasks
    ]
    header = [
        "task",
        "steps",
        "first loss",
        "last loss",
        "solo steps",
        "loss difference",
        "adapter error",
        "bounds",
    ]
    notes = [
        f"{task.task_id}: undecided, as peft alone differs from itself by {task.loss_spread} (loss) and"
        f" {task.adapter_spread} (adapter) when only the order of a batch changes"
        for task in report.tasks
        if task.agreement == "undecided"
    ]
    return "\n".join([format_table(header, tasks), *notes])


def _compared(name: str, predicted: float, measured: float, show: Callable[[float], str]) -> list[str]:
    difference = show_difference(predicted, measured) if predicted and measured else "-"
    return [name, show(predicted), show(measured), difference]


def _signed(seconds: float) -> str:
    return ("-" if seconds < 0 else "+") + show_seconds(abs(seconds))


def _show_error(error: float | None, bound: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.1e}" if bound is None else f"{error:.1e} of {bound:.1e}"
