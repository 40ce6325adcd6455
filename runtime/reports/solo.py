"""Reference: one task alone, with transformers and what its method names, and nothing of our own execution.

A method names peft where peft has it, plain torch otherwise. What is shared with the runtime is only what a
task means: its examples, their order, its initial adapter's seed and its masks of dropout.
"""

# B sequences of a padded batch, S its length

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from muxtune.model import ModelSpec
from muxtune.tasks import Example, TaskData
from runtime.backbone.hugging_face import load_hf_model
from runtime.peft import RUNTIME_METHODS


@dataclass(frozen=True, slots=True)
class SoloResult:
    """What the task does when trained alone."""

    losses: list[float]
    """Loss of each step."""
    initial_adapter: dict[str, Tensor]
    """Adapter before the first step, under PEFT's keys."""
    adapter: dict[str, Tensor]
    """Adapter after the last of the steps."""
    step_s: list[float]
    """Seconds of each step."""


def train_solo(model: ModelSpec, data: TaskData, steps: int, *, draw: int = 0) -> SoloResult:
    """Train one task alone for its first ``steps`` steps.

    Args:
        model: Backbone; a fresh copy is loaded.
        data: The task with its examples.
        steps: Steps to train, at most the task's own.
        draw: 0 takes a batch in the task's micro-batches. Any other takes its sequences each alone, 1 in
            reverse order, and more in orders drawn from that number: the same but for rounding.
    """
    from transformers import get_scheduler  # noqa: PLC0415  # seconds to import

    task = data.task
    reference = RUNTIME_METHODS.get(task.peft.method).reference(load_hf_model(model), task, model)
    peft_model, initial = reference.module, reference.state()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=task.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=task.weight_decay
    )
    name = "constant_with_warmup" if task.lr_schedule == "constant" else task.lr_schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=task.warmup_steps, num_training_steps=task.steps
    )
    losses, step_s = [], []
    for step in range(steps):
        begin = perf_counter()
        batch = data.batch(step)
        targets = max(sum(example.target_tokens for example in batch), 1)
        total = 0.0
        size = 1 if draw else task.micro_batch_size
        for start in _in_order(range(0, len(batch), size), draw, step):
            examples = batch[start : start + size]
            reference.enter(step, start, [len(example.tokens) for example in examples])
            loss = _nll_sum(peft_model, examples) / targets
            loss.backward()
            total += float(loss.detach())
        if task.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
        step_s.append(perf_counter() - begin)
    return SoloResult(losses, initial, reference.state(), step_s)


def _in_order(starts: range, draw: int, step: int) -> list[int]:
    if draw > 1:
        return [int(start) for start in np.random.default_rng([draw, step]).permutation(starts)]
    return list(reversed(starts)) if draw else list(starts)


def _nll_sum(peft_model: torch.nn.Module, examples: list[Example]) -> Tensor:
    """Sum of the target tokens' negative log-likelihoods, over right-padded sequences."""
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), dtype=np.int64)
    mask = np.zeros((len(examples), length), dtype=np.int64)
    labels = np.full((len(examples), length), -100, dtype=np.int64)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        tokens[row, :n] = example.tokens
        mask[row, :n] = 1
        labels[row, example.target_start : n] = example.tokens[example.target_start :]
    logits = peft_model(
        input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), use_cache=False
    ).logits[:, -length:]  # behind the rows of virtual tokens, if its method has any
    labels_BS = torch.from_numpy(labels)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
