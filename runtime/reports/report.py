"""``run.json``: what a run took, per iteration, stage and class of actions."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from muxtune.cluster import DeviceKind
from muxtune.placement import Placement
from muxtune.plan import IterationTokens, Parallelism, Plan, ideal_iteration_s
from muxtune.schedule import COMPUTE, Action, ActionSpan, OperatorSpan, iteration_ends_s
from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_text_atomically
from muxtune.support.machine import usable_cores
from runtime.reports.footprint import MeasuredMemory
from runtime.tasks.outputs import TaskStatus

_STRICT = ConfigDict(frozen=True, extra="forbid")


class Host(BaseModel):
    """Machine that the run was on."""

    model_config = _STRICT

    name: str
    machine: str
    system: str
    cores: int


class TokenTotals(BaseModel):
    """Tokens of all iterations of the report."""

    model_config = _STRICT

    all: int
    billed: int
    effective: int


class RunReport(BaseModel):
    """Measurements of one run; times are of the iterations of the last start, after a resume too.

    Of a stage that several ranks play, times are those of its first rank (first replica, first shard).
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    policy: str
    device: DeviceKind = "cpu"
    """Kind of device that the ranks computed on; the plan may be for another kind."""
    steps: int
    """Iterations of the whole run."""
    first_step: int
    """Iterations that were done before, by the run that was resumed."""
    steady_steps: tuple[int, ...]
    """Iterations behind the medians: not the first, and all tasks train."""
    iteration_s: tuple[float, ...]
    """Seconds between the ends of successive iterations; the first from the start of the run."""
    median_iteration_s: float
    tokens_per_s: float
    billed_tokens_per_s: float
    effective_tokens_per_s: float
    mfu: float | None = None
    """Model FLOP utilization by the peak of the device that the plan is for, as the plan predicts it; null
    where that is not known, or the run was on another kind of device."""
    busy_s: tuple[float, ...]
    """Per stage, computing time in one steady iteration."""
    busy_fraction: tuple[float, ...]
    """Per stage, share of steady time in which it computes."""
    fwd_s: tuple[tuple[float, ...], ...]
    """[stage][hTask], median per micro-batch; 0 where an hTask did not run."""
    bwd_s: tuple[tuple[float, ...], ...]
    """[stage][hTask], median per micro-batch."""
    step_s: tuple[tuple[float, ...], ...]
    """[stage][hTask], median per optimizer step, without waiting for other stages."""
    wait_s: tuple[float, ...]
    """Per stage, waiting for tensors in one steady iteration."""
    exposed_communication_s: tuple[float, ...]
    """Per stage, waits of its actions for sums over its ranks in one steady iteration; part of ``busy_s``."""
    tokens: TokenTotals
    tasks: tuple[TaskStatus, ...] = ()
    """What became of each task; empty in a report of an earlier version."""
    memory: tuple[MeasuredMemory, ...]
    """Per stage, of that of its ranks that held most."""
    versions: dict[str, str]
    host: Host


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What one rank measured, or what stands for all ranks of a stage."""

    spans: list[ActionSpan]
    memory: MeasuredMemory
    operators: list[OperatorSpan] = field(default_factory=list)
    """Collectives that are traced."""
    exposed_s: dict[Action, float] = field(default_factory=dict)
    """What all F, or B, of an hTask's step waited for collectives; by the first of these actions."""


def stage_records(ranks: Sequence[StageRecord], parallelism: Parallelism) -> list[StageRecord]:
    """One record per stage: times of its first rank, and memory of the rank that held most.

    The ranks of a stage do the same and meet in every step, but replicas have other sequences.
    """
    placement = Placement(parallelism.tp, parallelism.pp, parallelism.dp, parallelism.ranks)
    records = []
    for stage in range(parallelism.pp if ranks else 0):
        own = [record for rank, record in enumerate(ranks) if placement.coordinates(rank).stage == stage]
        fullest = max(own, key=lambda record: record.memory.peak_bytes)
        records.append(replace(own[0], memory=fullest.memory))
    return records


def build_report(
    plan: Plan,
    *,
    steps: int,
    first_step: int,
    records: Sequence[StageRecord],
    tokens: Sequence[IterationTokens],
    device: DeviceKind = "cpu",
    stops: Mapping[str, int] | None = None,
    tasks: Sequence[TaskStatus | None] = (),
) -> RunReport:
    """Turn measurements into a report.

    Args:
        plan: Plan that was run.
        steps: Iterations of the whole run.
        first_step: Iterations done before.
        records: Record of every stage.
        tokens: Tokens of each iteration from ``first_step`` on.
        device: Kind of device that the ranks computed on.
        stops: Steps up to which each task took part; by default all of its own.
        tasks: What became of each.
    """
    spans = [span for record in records for span in record.spans]
    ends = iteration_ends_s(spans)
    lengths = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    steady = _steady_steps(plan, first_step, steps, stops or {})
    positions = [k - first_step for k in steady]
    start_s = ends[positions[0] - 1] if positions[0] else 0.0
    window_s = ends[positions[-1]] - start_s
    stages = range(plan.parallelism.pp)
    busy = [_seconds_within(records[s].spans, COMPUTE, start_s, start_s + window_s) for s in stages]
    wait = [_seconds_within(records[s].spans, None, start_s, start_s + window_s) - busy[s] for s in stages]
    classes = _class_medians(plan, spans, set(steady))
    return RunReport(
        policy=plan.policy,
        device=device,
        steps=steps,
        first_step=first_step,
        steady_steps=tuple(steady),
        iteration_s=tuple(lengths),
        median_iteration_s=median(lengths[i] for i in positions),
        tokens_per_s=median(tokens[i].all / lengths[i] for i in positions),
        billed_tokens_per_s=median(tokens[i].billed / lengths[i] for i in positions),
        effective_tokens_per_s=median(tokens[i].effective / lengths[i] for i in positions),
        mfu=_utilization(plan, device, median(lengths[i] for i in positions)),
        busy_s=tuple(seconds / len(steady) for seconds in busy),
        busy_fraction=tuple(seconds / window_s for seconds in busy),
        wait_s=tuple(seconds / len(steady) for seconds in wait),
        exposed_communication_s=tuple(
            _seconds_in_steps(plan, record.exposed_s, set(steady)) / len(steady) for record in records
        ),
        fwd_s=classes["F"],
        bwd_s=classes["B"],
        step_s=classes["STEP"],
        tokens=TokenTotals(
            all=int(sum(t.all for t in tokens)),
            billed=int(sum(t.billed for t in tokens)),
            effective=int(sum(t.effective for t in tokens)),
        ),
        tasks=tuple(task for task in tasks if task is not None),
        memory=tuple(record.memory for record in records),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("muxtune", "torch", "transformers", "peft")},
        host=Host(
            name=platform.node(),
            machine=platform.machine(),
            system=f"{platform.system()} {platform.release()}",
            cores=usable_cores(),
        ),
    )


def _utilization(plan: Plan, device: DeviceKind, iteration_s: float) -> float | None:
    ideal_s = ideal_iteration_s(plan.decisions, plan.derived)
    return None if ideal_s is None or device != plan.cluster.device.kind else ideal_s / iteration_s


def save_report(report: RunReport, path: Path) -> None:
    """Write ``run.json``; the file is whole or absent."""
    write_text_atomically(path, report.model_dump_json(indent=1) + "\n")


def load_report(path: Path) -> RunReport:
    """Read ``run.json``.

    Raises:
        UserError: Missing, or not such a file.
    """
    try:
        return RunReport.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the report {path}: {error.strerror}; was the run finished?") from error
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error


def _steady_steps(plan: Plan, first_step: int, steps: int, stops: Mapping[str, int]) -> list[int]:
    """Iterations to take medians of; as many conditions as can be met.

    The first iteration is slower (memory is being measured and allocated, the pipeline fills). Tasks that had
    failed before it do not count.
    """
    later = range(first_step + 1, steps)
    own = [stops.get(task.id, task.steps) for task in plan.tasks]
    full = [k for k in later if all(k < stop for stop in own if stop > first_step)]
    return full or list(later) or [first_step]


def _seconds_within(spans: Sequence[ActionSpan], stream: str | None, start_s: float, end_s: float) -> float:
    """Seconds of the spans of one stage that lie in a window; all streams if ``stream`` is None."""
    return sum(
        max(0.0, min(span.end_s, end_s) - max(span.start_s, start_s))
        for span in spans
        if stream is None or span.stream == stream
    )


def _seconds_in_steps(plan: Plan, seconds: Mapping[Action, float], steps: set[int]) -> float:
    """Seconds of the forwards and backwards of these steps."""
    return sum(s for a, s in seconds.items() if a.number // plan.microbatches[a.htask] in steps)


def _class_medians(
    plan: Plan, spans: Sequence[ActionSpan], steady: set[int]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Median seconds per action kind, [stage][hTask]."""
    seconds: dict[tuple[int, Action], float] = defaultdict(float)
    for span in spans:
        if span.stream == COMPUTE:
            seconds[span.stage, span.action] += span.duration_s
    groups: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for (stage, action), duration_s in seconds.items():
        m = 1 if action.kind == "STEP" else plan.microbatches[action.htask]
        if action.number // m in steady:
            groups[stage, action.kind, action.htask].append(duration_s)
    return {
        kind: tuple(
            tuple(median(groups.get((stage, kind, h), [0.0])) for h in range(len(plan.htasks)))
            for stage in range(plan.parallelism.pp)
        )
        for kind in ("F", "B", "STEP")
    }
