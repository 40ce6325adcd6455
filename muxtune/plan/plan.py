"""A plan: everything that simulator and runtime need, as data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from muxtune.batches import Alignment, AlignmentReport, HTaskShape
from muxtune.cluster import ClusterSpec
from muxtune.costs.ref import CostsRef
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.graph.operators import Phase
from muxtune.model import BackboneDigest, ModelSpec
from muxtune.orchestration import Cut, LaunchOrder, action_cut, left_of
from muxtune.placement import Placement
from muxtune.plan.launch_orders import ClockLaunches
from muxtune.schedule import Action, Kind, Template, clocks_in_flight, clocks_of
from muxtune.support.strict_models import MOST_SECONDS, Seconds, StrictModel
from muxtune.tasks import PeftTask

SCHEMA_VERSION = 1


class Parallelism(StrictModel):
    """How the backbone is spread over ranks."""

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


class HTask(StrictModel):
    """Tasks that run as one through the backbone."""

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
    """Number of the copy of the backbone that runs it; policies without a shared backbone have one per
    task."""


class Orchestration(StrictModel):
    """How the operators of one clock are ordered inside a stage (paper section 3.4).

    sequential   one after the other
    intra        communication of an hTask runs beside its own computation
    round-robin  the hTasks of a bucket share clocks and take turns, subgraph by subgraph
    interleaved  the hTasks of a bucket share clocks, ordered by list scheduling
    """

    mode: Literal["sequential", "intra", "round-robin", "interleaved"] = "sequential"
    contention: float = Field(default=0.0, ge=0)
    """While computation and communication run at once, each runs at the rate 1 / (1 + contention)."""
    adapters: Literal["grouped", "separate"] = "grouped"
    """Adapters of one hTask at one base operator: a single kernel call, or one call per task."""
    launches: tuple[ClockLaunches, ...] = ()
    """Launch orders of every kind of clock that is played with overlap; empty where nothing overlaps. A plan
    without them is executed without overlap."""

    @property
    def shares_clocks(self) -> bool:
        """Whether the hTasks of a bucket share clocks."""
        return self.mode in {"round-robin", "interleaved"}


class Execution(StrictModel):
    """With which of its means the runtime executes the plan."""

    attention: AttentionName = DEFAULT_ATTENTION
    """Backend of attention, by the contest of the profile."""


_Rate = Annotated[float, Field(gt=0, le=1e15)]


class ClockSeconds(StrictModel):
    """Duration of a clock that several hTasks share."""

    kind: Literal["F", "B"]
    htasks: tuple[int, ...] = Field(min_length=2)
    """hTasks of the clock, in the order of their bucket."""
    seconds: tuple[Seconds, ...]
    """Seconds on each stage; of a backward with its share of the optimizer steps."""


class Predicted(StrictModel):
    """What the simulator expects; ``muxtune simulate --json`` prints the same keys."""

    iteration_s: Seconds
    """Steady state of one iteration."""
    tokens_per_s: _Rate
    """All tokens that go through the backbone."""
    billed_tokens_per_s: _Rate
    effective_tokens_per_s: _Rate
    peak_memory_bytes: tuple[Annotated[int, Field(gt=0)], ...]
    """Peak memory of each stage."""
    bubble_fraction: float = Field(ge=0, lt=1)
    """Share of the stages' time in steady state in which they wait."""
    theoretical_bubble_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Bubble fraction if all clocks took equally long and transfers no time, see
    :func:`muxtune.plan.theoretical_bubble_fraction`."""
    lower_bound_s: Seconds
    """Work of the busiest stage in one iteration; no schedule of these clocks is faster."""
    scheduled_iterations: int
    makespan_s: Seconds
    """Seconds of the whole schedule."""
    fwd_s: tuple[tuple[Seconds, ...], ...]
    """[stage][hTask], seconds per micro-batch."""
    bwd_s: tuple[tuple[Seconds, ...], ...]
    """[stage][hTask], seconds per micro-batch, with its share of the optimizer step."""
    p2p_s: tuple[Annotated[float, Field(ge=0, le=MOST_SECONDS)], ...]
    """[hTask], seconds per transfer between neighbouring stages; 0 where there is one stage."""
    clock_s: tuple[ClockSeconds, ...] = ()
    """Seconds of every kind of clock in the schedule that several hTasks share."""
    alignment: AlignmentReport | None = None
    """Tokens per iteration, and what other alignments of the same hTasks would need."""
    made_for: dict[str, str] = Field(default={})
    """Digests of what this was computed from, by field: a plan with other fields is refused, see
    :mod:`muxtune.plan.basis`."""


class Plan(StrictModel):
    """A complete plan; :func:`muxtune.plan.load_plan` has checked that its parts agree."""

    schema_version: Literal[1]
    model: ModelSpec
    backbone: BackboneDigest | None = None
    """Digests of the model's directory when the plan was made; a changed one is refused. Null for a
    preset."""
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
    def placement(self) -> Placement:
        """Where the ranks stand on the cluster."""
        p = self.parallelism
        return Placement(p.tp, p.pp, p.dp, self.cluster.devices_per_node)

    @property
    def overlaps(self) -> bool:
        """Whether stages may compute while they communicate."""
        return self.parallelism.tp > 1 and self.orchestration.mode != "sequential"

    @property
    def idle_ranks(self) -> int:
        """Ranks of the cluster that the plan leaves idle."""
        return self.cluster.ranks - self.parallelism.tp * self.parallelism.pp * self.parallelism.dp

    @property
    def clock_kinds(self) -> list[tuple[Kind, tuple[int, ...]]]:
        """Kinds of the schedule's clocks, as direction and hTasks; steps are none."""
        clocks = clocks_of(self.actions[0], self.microbatches, self.shared_buckets)
        kinds = ((clock[0].kind, tuple(action.htask for action in clock)) for clock in clocks)
        return list(dict.fromkeys(kind for kind in kinds if kind[0] != "STEP"))

    def launch_order(self, stage: int, phase: Phase, htasks: tuple[int, ...]) -> LaunchOrder | None:
        """Order in which a stage launches the subgraphs of a kind of clock; None if the plan does not say."""
        kind = _KINDS[phase]
        for clock in self.orchestration.launches:
            if (clock.kind, clock.htasks) == (kind, htasks):
                return clock.on_stage(stage)
        return None

    def remaining_order(self, stage: int, phase: Phase, htasks: tuple[int, ...]) -> LaunchOrder | None:
        """Launch order of a clock that these hTasks are left of, from the smallest clock with all of them."""
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

    def step_tokens(self, htask: int) -> int:
        """Tokens of an hTask's micro-batches in a step, on all replicas, while all its tasks train."""
        return self.shape(htask).step_tokens(task.global_batch_size for task in self.htask_tasks(htask))

    def htask_steps(self, limit: int | None = None) -> list[int]:
        """Optimizer steps per hTask: those of its longest task, at most ``limit``."""
        steps = [max(task.steps for task in self.htask_tasks(h.id)) for h in self.htasks]
        return steps if limit is None else [min(s, limit) for s in steps]

    def stage_layers(self, stage: int) -> range:
        """Backbone layers that a stage holds."""
        before = sum(self.parallelism.layers_per_stage[:stage])
        return range(before, before + self.parallelism.layers_per_stage[stage])


_KINDS: dict[Phase, Literal["F", "B"]] = {"fwd": "F", "bwd": "B"}
