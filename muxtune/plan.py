"""plan.json: everything that simulator and runtime need, in one versioned file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxtune.alignment import Alignment, HTaskShape
from muxtune.alignment_report import AlignmentReport
from muxtune.attention import DEFAULT_ATTENTION, AttentionName
from muxtune.cluster import ClusterSpec
from muxtune.errors import SpecError, UserError, naming, spec_error_from
from muxtune.files import write_text_atomically
from muxtune.injection import clocks_in_flight
from muxtune.launches import ClockLaunches
from muxtune.model import ModelSpec
from muxtune.operators import Phase
from muxtune.orchestration import Cut, LaunchOrder, action_cut, check_order, left_of
from muxtune.schedule import Action, Kind, Template, clocks_of
from muxtune.schedule_check import check_schedule
from muxtune.workload import PeftTask

SCHEMA_VERSION = 1

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither


class CostsRef(BaseModel):
    """Which operator costs the plan was made with."""

    model_config = _STRICT

    profile_id: str
    device: str
    digest: str


class Parallelism(BaseModel):
    """How the backbone is spread over ranks."""

    model_config = _STRICT

    tp: int = Field(default=1, gt=0)
    """Ranks that share a stage."""
    pp: int = Field(gt=0)
    """Pipeline stages."""
    dp: int = Field(default=1, gt=0)
    """Replicas that share the data of every step."""
    layers_per_stage: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Processes that the plan needs."""
        return self.tp * self.pp * self.dp


class HTask(BaseModel):
    """Tasks that run as one through the backbone."""

    model_config = _STRICT

    id: int = Field(ge=0)
    """Position in the plan's list."""
    task_ids: tuple[str, ...] = Field(min_length=1)
    alignment: Alignment
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Chunk length under ``chunk``; null otherwise."""
    microbatches: int = Field(gt=0)
    """Per optimizer step, on each replica."""
    carry_microbatches: int = Field(default=1, gt=0)
    """Micro-batches in a row over which the chunks of a sequence may spread. They go back in reverse order. A
    power of two that divides ``microbatches``; more than 1 under ``chunk`` only."""
    tokens_per_microbatch: int = Field(gt=0)
    instance: int = Field(default=0, ge=0)
    """Which copy of the backbone runs it; policies without a shared backbone have one per task."""


class Orchestration(BaseModel):
    """How the operators of one clock are ordered inside a stage (paper section 3.4).

    sequential   one after the other
    intra        communication of an hTask runs beside its own computation
    round-robin  the hTasks of a bucket share clocks and take turns, subgraph by subgraph
    interleaved  the hTasks of a bucket share clocks, ordered by list scheduling
    """

    model_config = _STRICT

    mode: Literal["sequential", "intra", "round-robin", "interleaved"] = "sequential"
    contention: float = Field(default=0.0, ge=0)
    """While computation and communication run at once, each runs at the rate 1 / (1 + contention)."""
    adapters: Literal["grouped", "separate"] = "grouped"
    """Adapters of one hTask at one base operator: a single kernel call, or one call per task."""
    launches: tuple[ClockLaunches, ...] = ()
    """Of every kind of clock that is played with overlap; empty where nothing overlaps. A plan without them
    is executed without overlap."""

    @property
    def shares_clocks(self) -> bool:
        """Whether the hTasks of a bucket share clocks."""
        return self.mode in {"round-robin", "interleaved"}


class Execution(BaseModel):
    """With which of its means the runtime executes the plan."""

    model_config = _STRICT

    attention: AttentionName = DEFAULT_ATTENTION
    """Backend of attention, by the contest of the profile."""


class ClockSeconds(BaseModel):
    """Duration of a clock that several hTasks share."""

    model_config = _STRICT

    kind: Literal["F", "B"]
    htasks: tuple[int, ...] = Field(min_length=2)
    """In the order of their bucket."""
    seconds: tuple[float, ...]
    """Per stage; of a backward with its share of the optimizer steps."""


class Predicted(BaseModel):
    """What the simulator expects; ``muxtune simulate --json`` prints the same keys."""

    model_config = _STRICT

    iteration_s: float
    """Steady state of one iteration."""
    tokens_per_s: float
    """All tokens that go through the backbone."""
    billed_tokens_per_s: float
    effective_tokens_per_s: float
    peak_memory_bytes: tuple[int, ...]
    """Per stage."""
    bubble_fraction: float
    """Share of the stages' time in steady state in which they wait."""
    theoretical_bubble_fraction: float | None = None
    """The same if all clocks took equally long and transfers no time, see
    :func:`muxtune.prediction.theoretical_bubble_fraction`."""
    lower_bound_s: float
    """Work of the busiest stage in one iteration; no schedule of these clocks is faster."""
    scheduled_iterations: int
    makespan_s: float
    """Of the whole schedule."""
    fwd_s: tuple[tuple[float, ...], ...]
    """[stage][hTask], seconds per micro-batch."""
    bwd_s: tuple[tuple[float, ...], ...]
    """[stage][hTask], seconds per micro-batch, with its share of the optimizer step."""
    p2p_s: tuple[float, ...]
    """[hTask], seconds per transfer between neighbouring stages."""
    clock_s: tuple[ClockSeconds, ...] = ()
    """Of every kind of clock in the schedule that several hTasks share."""
    alignment: AlignmentReport | None = None
    """Tokens per iteration, and what other alignments of the same hTasks would need."""


class Plan(BaseModel):
    """A complete plan; :func:`load_plan` has checked that its parts agree."""

    model_config = _STRICT

    schema_version: Literal[1]
    model: ModelSpec
    cluster: ClusterSpec
    costs: CostsRef
    policy: str
    parallelism: Parallelism
    tasks: tuple[PeftTask, ...] = Field(min_length=1)
    htasks: tuple[HTask, ...] = Field(min_length=1)
    buckets: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """hTasks per bucket, in order of injection."""
    template: Template
    schedule: tuple[tuple[tuple[Kind, int, int], ...], ...]
    """Per stage, actions ["F", hTask, micro-batch], ["B", ...], ["STEP", hTask, step]."""
    orchestration: Orchestration = Orchestration()
    execution: Execution = Execution()
    predicted: Predicted

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Plan:
        """A copy with other fields, without what was derived from the old ones."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("actions", "tasks_by_id"):
            copy.__dict__.pop(name, None)
        return copy

    @cached_property
    def actions(self) -> list[list[Action]]:
        """The schedule as actions."""
        return [[Action(*entry) for entry in stage] for stage in self.schedule]

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Per hTask and step, on each replica."""
        return tuple(htask.microbatches for htask in self.htasks)

    @property
    def carries(self) -> tuple[int, ...]:
        """Micro-batches of a carry group, per hTask."""
        return tuple(htask.carry_microbatches for htask in self.htasks)

    @property
    def shared_buckets(self) -> tuple[tuple[int, ...], ...] | None:
        """Buckets whose hTasks share clocks; None if every action is a clock of its own."""
        return self.buckets if self.orchestration.shares_clocks else None

    def open_limit(self, stage: int) -> int:
        """Micro-batches that a stage may have in flight, at most."""
        instances = [htask.instance for htask in self.htasks]
        clocks = clocks_in_flight(
            self.template,
            self.microbatches,
            pp=self.parallelism.pp,
            stage=stage,
            instances=instances,
            carries=self.carries,
        )
        if self.template == "gpipe":
            return clocks  # each counted once per hTask
        return clocks * max(len(bucket) for bucket in self.shared_buckets or ((0,),))

    @property
    def overlaps(self) -> bool:
        """Whether stages may compute while they communicate."""
        return self.parallelism.tp > 1 and self.orchestration.mode != "sequential"

    @property
    def clock_kinds(self) -> list[tuple[Kind, tuple[int, ...]]]:
        """Kinds of the schedule's clocks, as direction and hTasks; steps are none."""
        clocks = clocks_of(self.actions[0], self.microbatches, self.shared_buckets)
        kinds = ((clock[0].kind, tuple(action.htask for action in clock)) for clock in clocks)
        return list(dict.fromkeys(kind for kind in kinds if kind[0] != "STEP"))

    def launch_order(self, stage: int, phase: Phase, htasks: tuple[int, ...]) -> LaunchOrder | None:
        """In what order a stage launches the subgraphs of a kind of clock; None if the plan does not say."""
        kind = _KINDS[phase]
        for clock in self.orchestration.launches:
            if (clock.kind, clock.htasks) == (kind, htasks):
                return clock.on_stage(stage)
        return None

    def remaining_order(self, stage: int, phase: Phase, htasks: tuple[int, ...]) -> LaunchOrder | None:
        """The same where hTasks of a clock may have finished: what is left of the smallest that has these."""
        kind = _KINDS[phase]
        larger = [
            clock
            for clock in self.orchestration.launches
            if clock.kind == kind and set(htasks) <= set(clock.htasks)
        ]
        if not larger:
            return None
        clock = min(larger, key=lambda each: len(each.htasks))
        return left_of(clock.on_stage(stage), clock.htasks, htasks)

    def action_cut(self, stage: int, phase: Phase, htask: int) -> Cut:
        """The subgraphs of an hTask's action on a stage."""
        p = self.parallelism
        return action_cut(
            self.model,
            p.layers_per_stage[stage],
            first=stage == 0,
            last=stage == p.pp - 1,
            loras=tuple(task.peft for task in self.htask_tasks(htask)),
            tokens=self.htasks[htask].tokens_per_microbatch,
            phase=phase,
            tp=p.tp,
            adapters=self.orchestration.adapters,
        )

    @cached_property
    def tasks_by_id(self) -> dict[str, PeftTask]:
        """Tasks under their ids."""
        return {task.id: task for task in self.tasks}

    def htask_tasks(self, htask: int) -> tuple[PeftTask, ...]:
        """Tasks of one hTask, in the order of their spans."""
        return tuple(self.tasks_by_id[task_id] for task_id in self.htasks[htask].task_ids)

    def shape(self, htask: int) -> HTaskShape:
        """Static shape of one hTask's micro-batches."""
        entry = self.htasks[htask]
        row_tokens = entry.chunk_tokens
        if entry.alignment == "pad":
            row_tokens = max(task.max_length for task in self.htask_tasks(htask))
        return HTaskShape(
            alignment=entry.alignment,
            row_tokens=row_tokens,
            microbatches=entry.microbatches,
            tokens=entry.tokens_per_microbatch,
            replicas=self.parallelism.dp,
            carry=entry.carry_microbatches,
        )

    def htask_steps(self, limit: int | None = None) -> list[int]:
        """Optimizer steps per hTask: those of its longest task, at most ``limit``."""
        steps = [max(task.steps for task in self.htask_tasks(h.id)) for h in self.htasks]
        return steps if limit is None else [min(s, limit) for s in steps]

    def stage_layers(self, stage: int) -> range:
        """Backbone layers that a stage holds."""
        before = sum(self.parallelism.layers_per_stage[:stage])
        return range(before, before + self.parallelism.layers_per_stage[stage])


_KINDS: dict[Phase, Literal["F", "B"]] = {"fwd": "F", "bwd": "B"}
_PHASES: dict[Kind, Phase] = {"F": "fwd", "B": "bwd"}


def check_plan(plan: Plan, where: str = "plan") -> None:
    """Refuse a plan whose parts contradict each other.

    Raises:
        SpecError: Names the field, its value and what was expected.
    """
    p = plan.parallelism
    if len(p.layers_per_stage) != p.pp or sum(p.layers_per_stage) != plan.model.layers:
        expected = f"{p.pp} integers with sum {plan.model.layers}, the layers of {plan.model.name}"
        raise SpecError(f"{where}: parallelism.layers_per_stage", list(p.layers_per_stage), expected)
    if min(p.layers_per_stage) < 1:
        raise SpecError(
            f"{where}: parallelism.layers_per_stage", list(p.layers_per_stage), "at least 1 per stage"
        )
    if p.ranks > plan.cluster.ranks:
        expected = f"at most {plan.cluster.ranks}, the ranks of {plan.cluster.name}"
        raise SpecError(f"{where}: parallelism (tp * pp * dp)", p.ranks, expected)
    for task in plan.tasks:
        with naming(where):
            task.check(plan.model)
    if len(plan.tasks_by_id) != len(plan.tasks):
        raise SpecError(f"{where}: tasks", [t.id for t in plan.tasks], "unique ids")
    _check_htasks(plan, where)
    listed = sorted(h for bucket in plan.buckets for h in bucket)
    if listed != list(range(len(plan.htasks))) or not all(plan.buckets):
        expected = f"every hTask from 0 to {len(plan.htasks) - 1} once"
        raise SpecError(f"{where}: buckets", [list(b) for b in plan.buckets], expected)
    if len(plan.schedule) != p.pp:
        raise SpecError(f"{where}: schedule", f"{len(plan.schedule)} lists", f"one per stage ({p.pp})")
    if plan.orchestration.shares_clocks:
        _check_shared_clocks(plan, where)
    with naming(where):
        check_schedule(
            plan.actions,
            plan.microbatches,
            buckets=plan.shared_buckets,
            in_flight_limit=plan.template != "gpipe",
            carries=plan.carries,
        )
    missing = set(range(len(plan.htasks))) - {action.htask for action in plan.actions[0]}
    if missing:
        expected = "at least one step of every hTask"
        raise SpecError(f"{where}: schedule", f"no action of hTask {min(missing)}", expected)
    _check_predicted(plan, where)
    _check_launches(plan, where)


def _check_launches(plan: Plan, where: str) -> None:
    """What stands there is the order of every clock that overlaps, on every stage."""
    launches = plan.orchestration.launches
    if not launches:
        return
    field = f"{where}: orchestration.launches"
    listed = [(clock.kind, clock.htasks) for clock in launches]
    if not plan.overlaps:
        expected = f"nothing: no clock overlaps (tp {plan.parallelism.tp}, {plan.orchestration.mode})"
        raise SpecError(field, _named(listed), expected)
    if sorted(listed) != sorted(plan.clock_kinds):
        expected = f"nothing, or {', '.join(_named(plan.clock_kinds))}, once each"
        raise SpecError(field, _named(listed), expected)
    for position, clock in enumerate(launches):
        of_clock = f"{field}[{position}].orders"
        stages = [stage for each in clock.orders for stage in each.stages]
        if sorted(stages) != list(range(plan.parallelism.pp)):
            expected = f"every stage from 0 to {plan.parallelism.pp - 1} once"
            raise SpecError(f"{of_clock}.stages", stages, expected)
        for number, each in enumerate(clock.orders):
            for stage in each.stages:
                cuts = [plan.action_cut(stage, _PHASES[clock.kind], h) for h in clock.htasks]
                with naming(f"{of_clock}[{number}]"):
                    check_order(cuts, each.order)


def _named(kinds: Iterable[tuple[Kind, tuple[int, ...]]]) -> list[str]:
    return [f"{kind} of {list(htasks)}" for kind, htasks in kinds]


def _check_htasks(plan: Plan, where: str) -> None:
    assigned: list[str] = []
    for position, htask in enumerate(plan.htasks):
        field = f"{where}: htasks[{position}]"
        if htask.id != position:
            raise SpecError(f"{field}.id", htask.id, f"{position}, its position in the list")
        for task_id in htask.task_ids:
            if task_id not in plan.tasks_by_id:
                expected = f"one of {', '.join(sorted(plan.tasks_by_id))}"
                raise SpecError(f"{field}.task_ids", task_id, expected)
        assigned += htask.task_ids
        if (htask.alignment == "chunk") != (htask.chunk_tokens is not None):
            expected = "a chunk length under chunk, and null otherwise"
            raise SpecError(f"{field}.chunk_tokens", htask.chunk_tokens, expected)
        if htask.chunk_tokens is not None and htask.tokens_per_microbatch % htask.chunk_tokens:
            expected = f"a multiple of chunk_tokens ({htask.chunk_tokens})"
            raise SpecError(f"{field}.tokens_per_microbatch", htask.tokens_per_microbatch, expected)
        _check_carry(htask, plan.template, field)
        for task_id in htask.task_ids:
            needed = -(-plan.tasks_by_id[task_id].declared_microbatches // plan.parallelism.dp)
            if htask.microbatches < needed:
                expected = f"at least {needed}: {task_id} allows no more sequences per micro-batch"
                raise SpecError(f"{field}.microbatches", htask.microbatches, expected)
    if sorted(assigned) != sorted(plan.tasks_by_id):
        raise SpecError(f"{where}: htasks.task_ids", assigned, "every task in exactly one hTask")


def _check_carry(htask: HTask, template: Template, field: str) -> None:
    carry = htask.carry_microbatches
    if carry == 1:
        return
    if template == "lorapp":
        expected = "1: under lorapp an hTask has one micro-batch on its way"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)
    if htask.alignment != "chunk":
        expected = f"1: only chunks are carried on, and the alignment is {htask.alignment}"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)
    if carry & (carry - 1) or htask.microbatches % carry:
        expected = f"a power of two that divides microbatches ({htask.microbatches})"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)


def _check_shared_clocks(plan: Plan, where: str) -> None:
    for bucket in plan.buckets:
        instances = sorted({plan.htasks[h].instance for h in bucket})
        if len(instances) > 1:
            expected = f"one, as hTasks {list(bucket)} share clocks ({plan.orchestration.mode})"
            raise SpecError(f"{where}: htasks.instance", instances, expected)


def _check_clock_seconds(plan: Plan, where: str) -> None:
    field = f"{where}: predicted.clock_s"
    listed = [(clock.kind, clock.htasks) for clock in plan.predicted.clock_s]
    played = {
        (clock[0].kind, tuple(action.htask for action in clock))
        for clock in clocks_of(plan.actions[0], plan.microbatches, plan.shared_buckets)
        if len(clock) > 1
    }
    if len(listed) != len(played) or set(listed) != played:
        names = [f"{kind} of {list(htasks)}" for kind, htasks in sorted(played)]
        expected = ", ".join(names) if names else f"nothing: no clocks are shared ({plan.orchestration.mode})"
        raise SpecError(field, [f"{kind} of {list(htasks)}" for kind, htasks in listed], expected)
    for position, clock in enumerate(plan.predicted.clock_s):
        if len(clock.seconds) != plan.parallelism.pp:
            expected = f"{plan.parallelism.pp} numbers, one per stage"
            raise SpecError(f"{field}[{position}].seconds", len(clock.seconds), expected)


def _check_predicted(plan: Plan, where: str) -> None:
    p, stages, htasks = plan.predicted, plan.parallelism.pp, len(plan.htasks)
    tables = {"fwd_s": p.fwd_s, "bwd_s": p.bwd_s}
    for name, table in tables.items():
        if len(table) != stages or any(len(row) != htasks for row in table):
            expected = f"{stages} rows (stages) of {htasks} numbers (hTasks)"
            raise SpecError(f"{where}: predicted.{name}", [len(row) for row in table], expected)
    shown = 1 + max((a.number for a in plan.actions[0] if a.kind == "STEP"), default=-1)
    if p.scheduled_iterations != shown:
        expected = f"{shown}, the iterations of the schedule"
        raise SpecError(f"{where}: predicted.scheduled_iterations", p.scheduled_iterations, expected)
    if len(p.p2p_s) != htasks:
        raise SpecError(f"{where}: predicted.p2p_s", len(p.p2p_s), f"{htasks} numbers, one per hTask")
    if len(p.peak_memory_bytes) != stages:
        raise SpecError(
            f"{where}: predicted.peak_memory_bytes", len(p.peak_memory_bytes), f"{stages} numbers"
        )
    _check_clock_seconds(plan, where)


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        UserError: Missing, truncated, of another version, or inconsistent.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole JSON file: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        expected = f"{SCHEMA_VERSION}, the version that this muxtune reads"
        raise SpecError(f"{path}: schema_version", version, expected)
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    check_plan(plan, str(path))
    return plan


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan; the file is whole or absent."""
    write_text_atomically(path, plan.model_dump_json(indent=1) + "\n")
