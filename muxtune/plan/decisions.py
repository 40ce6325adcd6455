"""The part of a plan that a person may write or edit; all else follows from it, from data and costs."""

from __future__ import annotations

from pydantic import Field, JsonValue

from muxtune.batches import Alignment
from muxtune.cluster import ClusterSpec
from muxtune.costs.ref import CostsRef
from muxtune.graph import Launching
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.model import ModelSpec
from muxtune.orchestration import Mode
from muxtune.placement import Placement
from muxtune.schedule import Template
from muxtune.support.strict_models import StrictModel
from muxtune.tasks import PeftTask


class Parallelism(StrictModel):
    """How the backbone is spread over ranks.

    Rank ``((replica * pp) + stage) * tp + shard`` is on node ``rank // devices_per_node``.
    """

    tp: int = Field(default=1, gt=0)
    """Ranks that share a stage."""
    pp: int = Field(gt=0)
    """Pipeline stages."""
    dp: int = Field(default=1, gt=0)
    """Replicas that share the data of every step."""
    layers_per_stage: tuple[int, ...]
    """Layers of the backbone on each stage; their sum is the backbone's."""

    @property
    def ranks(self) -> int:
        """Processes that the plan needs."""
        return self.tp * self.pp * self.dp


class HTaskDecision(StrictModel):
    """Tasks that run as one through the backbone, and how their data is laid out."""

    task_ids: tuple[str, ...] = Field(min_length=1)
    """Ids of its tasks, in their order in the stream. Each task is in exactly one hTask."""
    alignment: Alignment
    """How sequences lie in the stream: padded, packed, or packed and cut into equal chunks."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Chunk length under ``chunk``; null otherwise."""
    carry_microbatches: int = Field(default=1, gt=0)
    """Micro-batches in a row over which the chunks of a sequence may spread. They go back in reverse order.
    A power of two that divides the micro-batches; more than 1 under ``chunk`` only, not under ``lorapp``."""
    microbatches: int | None = Field(default=None, gt=0)
    """Micro-batches of a step on each replica, where they are more than the tasks' sizes ask for; null for as
    few as these allow."""
    instance: int = Field(default=0, ge=0)
    """Number of the copy of the backbone that runs it; policies without a shared backbone have one per
    task."""


class OrchestrationDecision(StrictModel):
    """How the operators of one clock are ordered inside a stage (paper section 3.4).

    sequential   one after the other
    intra        communication of an hTask runs beside its own computation
    round-robin  the hTasks of a bucket share clocks and take turns, subgraph by subgraph
    interleaved  the hTasks of a bucket share clocks, ordered by list scheduling
    """

    mode: Mode = "sequential"
    """``sequential``, ``intra``, ``round-robin`` or ``interleaved``."""
    adapters: Launching = "grouped"
    """Adapters of one hTask at one base operator: a single kernel call, or one call per task."""

    @property
    def shares_clocks(self) -> bool:
        """Whether the hTasks of a bucket share clocks."""
        return self.mode in {"round-robin", "interleaved"}


class Execution(StrictModel):
    """With which of its means the runtime executes the plan."""

    attention: AttentionName = DEFAULT_ATTENTION
    """Backend of attention: the one whose times the costs have, by the contest of the profile."""


class Decisions(StrictModel):
    """All that is decided: tasks, backbone, machine, and how they are put together."""

    policy: str
    """Who decided: a policy, or ``by-hand``. A label."""
    policy_options: dict[str, JsonValue] = Field(default_factory=dict)
    """Options of the policy's own that it was asked with, defaults included. Labels."""
    objective: str = "iteration"
    """What the search made small: ``iteration``, ``memory``, ``slowest-tenant`` or the name of a function. A
    label."""
    model: ModelSpec
    """The backbone."""
    cluster: ClusterSpec
    """The machine."""
    costs: CostsRef | None = None
    """Operator costs that the plan is priced with; null for those that its device has by default."""
    parallelism: Parallelism
    """How the backbone is spread over ranks."""
    tasks: tuple[PeftTask, ...] = Field(min_length=1)
    """The tenants' jobs, as in the workload; paths of datasets are absolute."""
    htasks: tuple[HTaskDecision, ...] = Field(min_length=1)
    """The fusion: which tasks run as one. Other fields name an hTask by its position here, from 0."""
    buckets: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """hTasks per bucket, in order of injection; every hTask once."""
    template: Template
    """Rule by which the schedule is generated."""
    injection: tuple[int, ...] = ()
    """hTasks of an iteration's micro-batches in the order in which they enter the pipeline, in place of the
    turns of the buckets; empty where buckets and template say it."""
    in_flight: tuple[int, ...] = ()
    """Clocks that each stage may have in flight, in place of the template's limit: none more than the stage
    before, and no fewer than the largest carry group; empty where the template says it."""
    orchestration: OrchestrationDecision = OrchestrationDecision()
    """How the operators of a clock overlap."""
    execution: Execution = Execution()
    """Means of the runtime."""

    @property
    def placement(self) -> Placement:
        """Where the ranks stand on the cluster."""
        p = self.parallelism
        return Placement(p.tp, p.pp, p.dp, self.cluster.devices_per_node)
