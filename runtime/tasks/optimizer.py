"""The optimizer of one task: AdamW with transformers' learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from muxtune.tasks import PeftTask


def build_optimizer(parameters: Iterable[nn.Parameter], task: PeftTask) -> torch.optim.Optimizer:
    """AdamW over a task's adapter on a stage; the caller sets ``lr`` of its group before each step."""
    # On one CPU core, 56 tensors of rank 8 take 0.20 ms fused, 0.60 ms with foreach, 0.87 ms one by one.
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate(task, 0),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=task.weight_decay,
        fused=True,
    )


def learning_rate(task: PeftTask, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0), as ``transformers.get_scheduler`` has it.

    With warm-up, the rate rises linearly from 0; then it stays, falls linearly to 0 or along half a cosine.
    """
    warmup = task.warmup_steps
    if step < warmup:
        return task.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, task.steps - warmup)
    if task.lr_schedule == "linear":
        return task.learning_rate * max(0.0, 1.0 - progress)
    if task.lr_schedule == "cosine":
        return task.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return task.learning_rate
