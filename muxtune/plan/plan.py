"""A plan: everything that simulator and runtime need, as data, in three parts.

``decisions`` are what a person may write or edit, ``derived`` is what follows from them, ``predicted`` what
both are expected to do. A plan is made from decisions (:mod:`muxtune.planning.problem.derive`). Whoever
changes a part by hand has parts that no longer belong together; :func:`muxtune.plan.check_plan` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, Field

from muxtune.batches import HTaskShape
from muxtune.cluster import ClusterSpec
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import Phase
from muxtune.model import BackboneDigest, ModelSpec
from muxtune.orchestration import Cut, LaunchOrder, action_cut, left_of
from muxtune.peft import Specs, stages_layers
from muxtune.placement import Placement
from muxtune.plan.decisions import (
    Decisions,
    Execution,
    HTaskDecision,
    OrchestrationDecision,
    Parallelism,
)
from muxtune.plan.derived import Derived
from muxtune.plan.launch_orders import ClockLaunches
from muxtune.plan.predicted import Predicted
from muxtune.schedule import Action, Kind, Template, clocks_in_flight, clocks_of
from muxtune.support.strict_models import StrictModel
from muxtune.tasks import PeftTask

SCHEMA_VERSION = 2


class HTask(HTaskDecision):
    """Tasks that run as one through the backbone, with the shape that follows for their micro-batches."""

    id: int = Field(ge=0)
    """Position in the plan's list."""
    microbatches: int = Field(gt=0)  # here always a number
    """Per optimizer step, on each replica."""
    tokens_per_microbatch: int = Field(gt=0)
    """Tokens of the stream, padding included."""


class Orchestration(OrchestrationDecision):
    """How the operators of one clock are ordered inside a stage, with what follows for it."""

    contention: float = Field(default=0.0, ge=0)
    """While computation and communication run at once, each runs at the rate 1 / (1 + contention)."""
    launches: tuple[ClockLaunches, ...] = ()
    """Launch orders of every kind of clock that is played with overlap."""


class Plan(StrictModel):
    """A complete plan; :func:`muxtune.plan.load_plan` has checked that its parts agree."""

    schema_version: Literal[2] = 2
    """Version of this format."""
    decisions: Decisions
    """What a person may write or edit."""
    derived: Derived
    """What follows from the decisions."""
    predicted: Predicted
    """What is expected, and the digests of what that belongs to."""

    def with_decisions(self, **changes: object) -> Plan:
        """A copy with other decisions, and all that was derived from the old ones still in it."""
        return self.model_copy(
            update={"decisions": self.decisions.model_copy(update=_known(Decisions, changes))}
        )

    def with_derived(self, **changes: object) -> Plan:
        """A copy in which something else is said to follow from the decisions."""
        return self.model_copy(update={"derived": self.derived.model_copy(update=_known(Derived, changes))})

    def with_predicted(self, predicted: Predicted) -> Plan:
        """A copy with another prediction."""
        return self.model_copy(update={"predicted": predicted})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Plan:
        """A copy with other parts; fields inside of them have ``with_decisions`` and the like."""
        copy = super().model_copy(update=_known(Plan, update or {}), deep=deep)
        for name in copy.__dict__.keys() - Plan.model_fields.keys():
            del copy.__dict__[name]  # cached from the old parts
        return copy

    @property
    def policy(self) -> str:
        """Who decided."""
        return self.decisions.policy

    @property
    def model(self) -> ModelSpec:
        """The backbone."""
        return self.decisions.model

    @property
    def backbone(self) -> BackboneDigest | None:
        """Digests of the model's directory; None for a preset."""
        return self.derived.backbone

    @property
    def cluster(self) -> ClusterSpec:
        """The machine."""
        return self.decisions.cluster

    @property
    def costs(self) -> CostsRef:
        """Operator costs that the plan is priced with."""
        assert self.decisions.costs is not None, "check_plan refuses a plan that is not priced"
        return self.decisions.costs

    @property
    def parallelism(self) -> Parallelism:
        """How the backbone is spread over ranks."""
        return self.decisions.parallelism

    @cached_property
    def tasks(self) -> tuple[PeftTask, ...]:
        """Tasks, with the digests of their files."""
        inits = self.derived.init_sha256 or (None,) * len(self.decisions.tasks)
        return tuple(
            task.with_digests(dataset=dataset, init=init)
            for task, dataset, init in zip(
                self.decisions.tasks, self.derived.dataset_sha256, inits, strict=True
            )
        )

    @cached_property
    def htasks(self) -> tuple[HTask, ...]:
        """hTasks, with the shapes of their micro-batches."""
        both = zip(self.decisions.htasks, self.derived.htasks, strict=True)
        return tuple(
            HTask.model_construct(id=position, **{**dict(decision), **dict(shape)})
            for position, (decision, shape) in enumerate(both)
        )

    @property
    def buckets(self) -> tuple[tuple[int, ...], ...]:
        """HTasks per bucket, in order of injection."""
        return self.decisions.buckets

    @property
    def template(self) -> Template:
        """Rule by which the schedule is generated."""
        return self.decisions.template

    @property
    def injection(self) -> tuple[int, ...]:
        """Own order in which micro-batches enter the pipeline; empty where buckets and template say it."""
        return self.decisions.injection

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Own limit in flight of every stage; empty where the template says it."""
        return self.decisions.in_flight

    @property
    def execution(self) -> Execution:
        """Means of the runtime."""
        return self.decisions.execution

    @cached_property
    def orchestration(self) -> Orchestration:
        """How operators overlap, with contention and launch orders."""
        derived = self.derived
        return Orchestration.model_construct(
            **dict(self.decisions.orchestration), contention=derived.contention, launches=derived.launches
        )

    @property
    def schedule(self) -> tuple[tuple[tuple[Kind, int, int], ...], ...]:
        """Per stage, actions as the file has them."""
        return self.derived.schedule

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
            in_flight=self.in_flight,
        )
        if self.template == "gpipe":
            return clocks  # each counted once per hTask
        return clocks * max(len(bucket) for bucket in self.shared_buckets or ((0,),))

    @property
    def placement(self) -> Placement:
        """Where the ranks stand on the cluster."""
        return self.decisions.placement

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
            stages_layers(self.model, self.pefts, p.layers_per_stage)[stage],
            first=stage == 0,
            last=stage == p.pp - 1,
            pefts=tuple(task.peft for task in self.htask_tasks(htask)),
            tokens=self.htasks[htask].tokens_per_microbatch,
            phase=phase,
            tp=p.tp,
            adapters=self.orchestration.adapters,
        )

    @cached_property
    def pefts(self) -> Specs:
        """Methods of all tasks, in their order."""
        return tuple(task.peft for task in self.tasks)

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
            row_tokens = max(task.row_tokens for task in self.htask_tasks(htask))
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


def _known(part: type[BaseModel], changes: Mapping[str, object]) -> Mapping[str, object]:
    unknown = changes.keys() - part.model_fields.keys()
    assert not unknown, f"{part.__name__} has no {', '.join(sorted(unknown))}"
    return changes
