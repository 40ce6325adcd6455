"""A small, valid plan for tests that need no planner."""

from __future__ import annotations

from muxtune.cluster import load_cluster
from muxtune.costs.ref import CostsRef
from muxtune.model import PRESETS
from muxtune.plan import (
    HTask,
    IterationTokens,
    Orchestration,
    Parallelism,
    Plan,
    check_plan,
    finish_plan,
    predict,
)
from muxtune.schedule import ClockTimes, StageTimes, Template, build_schedule, evaluate_schedule
from muxtune.tasks import DatasetSpec, LoraSpec, PeftTask


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
    plan = Plan(
        schema_version=1,
        model=model,
        cluster=load_cluster(f"cpu-{pp}"),
        costs=CostsRef(profile_id="made-up", device="cpu", digest="0" * 64),
        policy="muxtune",
        parallelism=Parallelism(pp=pp, layers_per_stage=(model.layers // pp,) * pp),
        tasks=tasks,
        htasks=htasks,
        buckets=buckets,
        template=template,
        schedule=tuple(tuple((a.kind, a.htask, a.number) for a in stage) for stage in stages),
        orchestration=orchestration,
        predicted=predict(
            evaluate_schedule(stages, times),
            times=times,
            microbatches=microbatches,
            tokens=IterationTokens(all=2048, billed=2048, effective=900),
            peak_memory_bytes=[100_000_000] * pp,
        ),
    )
    plan = finish_plan(plan)
    check_plan(plan)
    return plan
