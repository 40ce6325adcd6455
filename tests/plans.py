"""Small, valid plans for tests that need no planner, and plans whose fields a test changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.costs.ref import CostsRef
from muxtune.model import PRESETS, ModelSpec
from muxtune.peft.lora import LoraSpec
from muxtune.plan import (
    Decisions,
    Derived,
    HTask,
    HTaskDecision,
    IterationTokens,
    MicrobatchShape,
    Orchestration,
    OrchestrationDecision,
    Parallelism,
    Plan,
    Predicted,
    check_plan,
    finish_plan,
    predict,
)
from muxtune.schedule import Action, ClockTimes, StageTimes, Template, build_schedule, evaluate_schedule
from muxtune.tasks import DatasetSpec, PeftTask

MADE_UP = CostsRef(profile_id="made-up", device="cpu", digest="0" * 64)


def plan_of(
    *,
    model: ModelSpec,
    cluster: ClusterSpec,
    parallelism: Parallelism,
    tasks: Sequence[PeftTask],
    htasks: Sequence[HTask],
    buckets: tuple[tuple[int, ...], ...],
    template: Template,
    actions: Sequence[Sequence[Action]],
    predicted: Predicted,
    orchestration: Orchestration | None = None,
    policy: str = "muxtune",
) -> Plan:
    """A plan with made-up costs from what its properties are to give; finished and checked."""
    orchestration = orchestration or Orchestration()
    decisions = Decisions(
        policy=policy,
        model=model,
        cluster=cluster,
        costs=MADE_UP,
        parallelism=parallelism,
        tasks=tuple(tasks),
        htasks=tuple(map(_decided, htasks)),
        buckets=buckets,
        template=template,
        orchestration=OrchestrationDecision(mode=orchestration.mode, adapters=orchestration.adapters),
    )
    derived = Derived(
        dataset_sha256=(None,) * len(tasks),
        htasks=tuple(map(_shape, htasks)),
        schedule=entries(actions),
        contention=orchestration.contention,
        launches=orchestration.launches,
    )
    plan = finish_plan(Plan(decisions=decisions, derived=derived, predicted=predicted))
    check_plan(plan)
    return plan


def changed(plan: Plan, **properties: Any) -> Plan:
    """A plan whose properties are others, in the parts that they come from; neither finished nor checked."""
    decided, derived = {}, {}
    for name, value in properties.items():
        if name == "htasks":
            before = [each.microbatches for each in plan.decisions.htasks]
            kept = [*before[: len(value)], *[None] * (len(value) - len(before))]
            decided["htasks"] = tuple(map(_decided, value, kept))
            derived["htasks"] = tuple(map(_shape, value))
        elif name == "orchestration":
            decided["orchestration"] = OrchestrationDecision(mode=value.mode, adapters=value.adapters)
            derived |= {"contention": value.contention, "launches": value.launches}
        elif name in Decisions.model_fields:
            decided[name] = value
        elif name in Derived.model_fields:
            derived[name] = value
        else:
            assert name == "predicted", name
            plan = plan.with_predicted(value)
    return plan.with_decisions(**decided).with_derived(**derived)


def entries(actions: Sequence[Sequence[Action]]) -> tuple[tuple[tuple[Any, int, int], ...], ...]:
    """Actions as a plan has them."""
    return tuple(tuple((a.kind, a.htask, a.number) for a in stage) for stage in actions)


def _decided(htask: HTask, microbatches: int | None = None) -> HTaskDecision:
    fields = {name: getattr(htask, name) for name in HTaskDecision.model_fields}
    return HTaskDecision(**fields | {"microbatches": microbatches})


def _shape(htask: HTask) -> MicrobatchShape:
    return MicrobatchShape(microbatches=htask.microbatches, tokens_per_microbatch=htask.tokens_per_microbatch)


def make_task(id_: str, *, max_length: int = 64, **changes: object) -> PeftTask:
    """A LoRA task on drawn lengths; ``changes`` replaces fields."""
    fields: dict[str, object] = {
        "id": id_,
        "peft": LoraSpec(method="lora", r=4, alpha=8, targets=("q_proj", "v_proj")),
        "dataset": DatasetSpec(lengths="sst2"),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_length": max_length,
        "learning_rate": 1e-3,
        "steps": 4,
    }
    return PeftTask.model_validate(fields | changes)


def make_plan(
    *, template: Template = "continuous", pp: int = 2, orchestration: Orchestration | None = None
) -> Plan:
    """Two hTasks, {a, b} and {c}, padded, on ``pp`` stages of llama-tiny.

    Each has a bucket of its own, or, if ``orchestration`` has hTasks share clocks, both have one.
    """
    orchestration = orchestration or Orchestration()
    model = PRESETS["llama-tiny"]
    tasks = (make_task("a"), make_task("b"), make_task("c", max_length=128))
    htasks = (
        HTask(
            id=0,
            task_ids=("a", "b"),
            alignment="pad",
            microbatches=2,
            tokens_per_microbatch=512,
        ),
        HTask(
            id=1,
            task_ids=("c",),
            alignment="pad",
            microbatches=2,
            tokens_per_microbatch=512,
        ),
    )
    shared = orchestration.shares_clocks
    buckets: tuple[tuple[int, ...], ...] = ((1, 0),) if shared else ((1,), (0,))
    microbatches = (2, 2)
    iterations = 3 if template == "continuous" else 1
    stages = build_schedule(
        buckets, microbatches, pp=pp, template=template, steps=[iterations] * 2, co_scheduled=shared
    )
    clocks = ClockTimes(
        buckets=buckets,
        microbatches=microbatches,
        seconds={("F", (1, 0)): [0.018] * pp, ("B", (1, 0)): [0.035] * pp},
    )
    times = StageTimes(
        fwd_s=[[0.010, 0.012]] * pp,
        bwd_s=[[0.020, 0.021]] * pp,
        p2p_s=[0.001, 0.001],
        clocks=clocks if shared else None,
    )
    return plan_of(
        model=model,
        cluster=load_cluster(f"cpu-{pp}"),
        parallelism=Parallelism(pp=pp, layers_per_stage=(model.layers // pp,) * pp),
        tasks=tasks,
        htasks=htasks,
        buckets=buckets,
        template=template,
        actions=stages,
        orchestration=orchestration,
        predicted=predict(
            evaluate_schedule(stages, times),
            times=times,
            microbatches=microbatches,
            tokens=IterationTokens(all=2048, billed=2048, effective=900),
            peak_memory_bytes=[100_000_000] * pp,
        ),
    )
