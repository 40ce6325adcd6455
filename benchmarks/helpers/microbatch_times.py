"""Processor time of a plan's first micro-batch on the whole backbone in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from muxtune.plan import Plan
from muxtune.support.allocator import keep_freed_memory
from runtime.backbone.stage import Stage
from runtime.backbone.weights import open_weights
from runtime.data.feed import Feed, load_plan_data
from runtime.tasks.adapter_files import initial_adapter, load_adapter

Action = Callable[[], object]


def measure_microbatches(plans: Sequence[Plan], rounds: int) -> list[tuple[float, float]]:
    """Seconds of forward and backward of each plan, the fastest of some rounds in which they take turns.

    Args:
        plans: Plans of one stage with one hTask.
        rounds: Rounds after the one that warms up.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    actions = [_build_actions(plan) for plan in plans]
    best = [[float("inf")] * 2 for _ in plans]
    for number in range(1 + rounds):
        for times, pair in zip(best, actions, strict=True):
            for phase, action in enumerate(pair):
                start_s = time.thread_time()
                action()
                if number:
                    times[phase] = min(times[phase], time.thread_time() - start_s)
    return [(forward_s, backward_s) for forward_s, backward_s in best]


def _build_actions(plan: Plan) -> tuple[Action, Action]:
    weights = open_weights(plan.model)
    stage = Stage(plan.model, plan.stage_layers(0), first=True, last=True, weights=weights)
    with TemporaryDirectory() as folder:
        for task in plan.tasks:
            own = Path(folder) / task.id
            initial_adapter(plan.model, task, own, weights)
            stage.add_task(task, load_adapter(own))
    batch = Feed(plan, load_plan_data(plan)).microbatch(0, 0)
    losses: list[Tensor] = []

    def forward() -> None:
        losses[:] = [stage.forward(batch, None).sum()]

    def backward() -> None:
        losses.pop().backward()

    return forward, backward
