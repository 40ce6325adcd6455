"""Where a prediction errs: the operators of real micro-batches by class, predicted and measured.

Each stage of a plan runs in a process of its own, all at the same time, as in a run but without messages.
How the time of a forward and a backward divides among the classes says the profiler of torch; what it costs
itself is taken out by scaling the parts to the time that the same action takes without it.
"""

# T tokens of the micro-batch, D hidden size

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from statistics import median
from threading import BrokenBarrierError

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent

from muxtune.costs import MicrobatchWork, ProfiledCosts, stage_operators
from muxtune.graph.operators import PHASES, Phase
from muxtune.peft import module_path, targeted_paths
from muxtune.plan import Plan
from muxtune.support.allocator import keep_freed_memory
from runtime.attention.rows import RowPlacement
from runtime.backbone.hugging_face import load_hf_model, torch_dtype
from runtime.backbone.stage import Stage
from runtime.data.batch import MicrobatchTensors
from runtime.data.feed import Feed, load_plan_data

CLASSES = ("linear", "lora", "attention", "norm", "activation", "embedding", "head", "feed", "between")
"""Kinds of ``muxtune.graph.operators``; ``between`` is what an action takes beside them."""

_STEP = 1
"""Iteration whose first micro-batches are taken: one in the middle of training is like any other."""

_REPETITIONS = 7


@dataclass(frozen=True, slots=True)
class ActionClasses:
    """One action (forward or backward of an hTask's micro-batch on a stage)."""

    stage: int
    htask: int
    phase: Phase
    work: MicrobatchWork
    seconds: dict[str, float]
    """Seconds of each class."""


def measure_classes(plan: Plan) -> list[ActionClasses]:
    """Forward and backward of the first micro-batch of every hTask, on every stage."""
    context = multiprocessing.get_context("spawn")
    stages = range(plan.parallelism.pp)
    barrier = context.Barrier(len(stages))
    with ProcessPoolExecutor(
        len(stages), mp_context=context, initializer=_start_process, initargs=(barrier,)
    ) as pool:
        futures = [pool.submit(_measure_stage, plan.model_dump_json(), stage) for stage in stages]
        return [action for future in futures for action in future.result()]


def predict_classes(plan: Plan, costs: ProfiledCosts, action: ActionClasses) -> dict[str, float]:
    """What the costs say about the same action, per class."""
    first, last = action.stage == 0, action.stage == plan.parallelism.pp - 1
    layers = plan.parallelism.layers_per_stage[action.stage]
    seconds: dict[str, float] = defaultdict(float)
    for op, count in stage_operators(
        plan.model, layers, first=first, last=last, work=action.work, phase=action.phase
    ):
        seconds[op.kind] += costs.latency_s(op, action.phase) * count
    seconds["between"] = costs.overhead(action.phase).fixed_s
    return dict(seconds)


def class_totals(plan: Plan, costs: ProfiledCosts) -> dict[str, tuple[float, float]]:
    """Per class, predicted and measured seconds of one iteration, summed over stages."""
    predicted, measured = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0.0)
    for action in measure_classes(plan):
        m = plan.microbatches[action.htask]
        for name, seconds in predict_classes(plan, costs, action).items():
            predicted[name] += m * seconds
        for name, seconds in action.seconds.items():
            measured[name] += m * seconds
    return {name: (predicted[name], measured[name]) for name in CLASSES}


_barrier: Barrier | None = None


def _start_process(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603  # a barrier only travels to a process as it starts
    _barrier = barrier
    os.environ["OMP_NUM_THREADS"] = "1"


def _measure_stage(plan_json: str, number: int) -> list[ActionClasses]:
    torch.set_num_threads(1)
    keep_freed_memory()
    plan = Plan.model_validate_json(plan_json)
    feed = Feed(plan, load_plan_data(plan))
    stages = _build_stages(plan, number)
    measured = []
    for htask in plan.htasks:
        position = _STEP * plan.microbatches[htask.id]
        batch = feed.microbatch(htask.id, position)
        work = _work(plan, htask.id, batch)
        feed_s = median(_seconds(lambda: feed.microbatch(htask.id, position)) for _ in range(_REPETITIONS))  # noqa: B023
        by_phase = _measure_actions(stages[htask.instance], batch, plan, number)
        by_phase["fwd"]["feed"] = feed_s
        measured += [ActionClasses(number, htask.id, phase, work, by_phase[phase]) for phase in PHASES]
    return measured


def _build_stages(plan: Plan, number: int) -> dict[int, Stage]:
    weights = load_hf_model(plan.model)
    stages: dict[int, Stage] = {}
    for htask in plan.htasks:
        if htask.instance not in stages:
            first, last = number == 0, number == plan.parallelism.pp - 1
            stages[htask.instance] = Stage(
                plan.model, plan.stage_layers(number), first=first, last=last, weights=weights
            )
        for task in plan.htask_tasks(htask.id):
            adapter: dict[str, Tensor] = {}
            for layer in plan.stage_layers(number):
                adapted = targeted_paths(task.peft, plan.model)[layer]
                for linear in (each for each in plan.model.linears if each.name in adapted):
                    path = f"base_model.model.{module_path(plan.model, layer, linear.name)}"
                    dtype = torch.promote_types(torch_dtype(plan.model), torch.float32)
                    a = torch.full((task.peft.r, linear.in_features), 0.01, dtype=dtype)
                    b = torch.full((linear.out_features, task.peft.r), 0.01, dtype=dtype)
                    adapter |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            stages[htask.instance].add_task(task, adapter)
    return stages


def _work(plan: Plan, htask: int, batch: MicrobatchTensors) -> MicrobatchWork:
    """The very micro-batch; the planner averages over several steps."""
    pefts = {task.id: task.peft for task in plan.htask_tasks(htask)}
    rows = batch.attention.placement
    assert isinstance(rows, RowPlacement), "the costs know calls of attention by rows and lengths"
    return MicrobatchWork(
        tokens=len(batch.tokens_T),
        task_tokens=tuple(span.stop - span.start for span in batch.spans),
        pefts=tuple(pefts[task_id] for task_id in batch.task_ids),
        attention=tuple((1.0, group.rows, group.length) for group in rows.layout.groups),
        targets=float(len(batch.target_ids_N)),
    )


def _measure_actions(
    stage: Stage, batch: MicrobatchTensors, plan: Plan, number: int
) -> dict[Phase, dict[str, float]]:
    first, last = number == 0, number == plan.parallelism.pp - 1
    received = torch.randn(len(batch.tokens_T), plan.model.hidden, dtype=torch_dtype(plan.model))
    opened: list[Tensor] = []

    def forward() -> None:
        hidden = None if first else received.detach().requires_grad_()
        output = stage.forward(batch, hidden)
        opened[:] = [output.sum() if last else output]

    def backward() -> None:
        output = opened.pop()
        torch.autograd.backward(output, None if last else torch.ones_like(output))

    calls: dict[Phase, Callable[[], None]] = {"fwd": forward, "bwd": backward}
    _meet()
    plain_s: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
    for _ in range(_REPETITIONS):
        for phase, call in calls.items():
            plain_s[phase].append(_seconds(call))
    shares: dict[Phase, list[dict[str, float]]] = {phase: [] for phase in PHASES}
    for _ in range(_REPETITIONS):
        for phase, call in calls.items():
            shares[phase].append(_profiled_shares(call, phase, last=last))
    return {
        phase: {
            name: median(s.get(name, 0.0) for s in shares[phase]) * median(plain_s[phase]) for name in CLASSES
        }
        for phase in PHASES
    }


def _meet() -> None:
    if _barrier is not None:
        # A stage that has failed breaks the barrier for the others; its own error is the one to see.
        with suppress(BrokenBarrierError):
            _barrier.wait(60)


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _profiled_shares(call: Callable[[], None], phase: Phase, *, last: bool) -> dict[str, float]:
    """Share of each class in the time of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        whole_s = _seconds(call)
    roots = sorted((e for e in profile.events() if e.cpu_parent is None), key=lambda e: e.time_range.start)
    names = [_plain_name(root) for root in roots]
    head = range(0)
    if last:  # the head selects its rows first, so that ends its backward
        selections = [
            i for i, name in enumerate(names) if name in {"aten::index_select", "IndexSelectBackward0"}
        ]
        head = range(selections[-1], len(roots)) if phase == "fwd" else range(selections[0] + 1)
    seconds = dict.fromkeys(CLASSES, 0.0)
    for i, root in enumerate(roots):
        for event in _with_descendants(root):
            name = "head" if i in head else _class_of(_plain_name(root), _plain_name(event))
            seconds[name] += event.self_cpu_time_total / 1e6
    seconds["between"] += whole_s - sum(seconds.values())
    return {name: value / whole_s for name, value in seconds.items()}


def _plain_name(event: FunctionEvent) -> str:
    return str(event.name).removeprefix("autograd::engine::evaluate_function: ")


def _with_descendants(event: FunctionEvent) -> Iterator[FunctionEvent]:
    yield event
    for child in event.cpu_children:
        yield from _with_descendants(child)


_ROOTS = {
    "_RmsNorm": "norm",
    "_RmsNormBackward": "norm",
    "aten::add": "norm",  # of the residual
    "AddBackward0": "norm",
    "_GatedSilu": "activation",
    "_GatedSiluBackward": "activation",
    "_ToRows": "attention",
    "_ToRowsBackward": "attention",
    "_FromRows": "attention",
    "_FromRowsBackward": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "ScaledDotProductFlashAttentionForCpuBackward0": "attention",
    "aten::index_select": "embedding",
    "torch::autograd::AccumulateGrad": "lora",
}
"""Class of what torch's profiler sees at the top, for the Llama family."""


def _class_of(root: str, name: str) -> str:
    if root.startswith("_LoraLinear"):
        return "linear" if name.startswith("mkldnn::") else "lora"
    return _ROOTS.get(root, "between")
