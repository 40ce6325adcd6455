"""Reference: one task alone, with Hugging Face transformers and peft and nothing of our own execution.

Shares with the runtime only what a task means: its examples, their order, its initial adapter's seed and its
masks of dropout.
"""

# B sequences of a padded batch, S its length

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from muxtune.model import ModelSpec
from muxtune.tasks import Example, PeftTask, TaskData
from runtime.backbone.hugging_face import load_hf_model
from runtime.reports.solo_dropout import SoloDropout
from runtime.tasks.adapter_files import quiet_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def train_solo(model: ModelSpec, data: TaskData, steps: int, *, one_by_one: bool = False) -> SoloResult:
    """Train one task alone for its first ``steps`` steps.

    Args:
        model: Backbone; a fresh copy is loaded.
        data: The task with its examples.
        steps: Steps to train, at most the task's own.
        one_by_one: Take the sequences of a batch in reverse order and each alone, instead of in the task's
            micro-batches: the same but for rounding.
    """
    from transformers import get_scheduler  # noqa: PLC0415  # seconds to import

    task = data.task
    backbone = load_hf_model(model)
    peft_model = _with_adapter(backbone, model, task)
    initial = _adapter_of(peft_model)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=task.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=task.weight_decay
    )
    dropout = SoloDropout(peft_model, task)
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
        size = 1 if one_by_one else task.micro_batch_size
        starts = range(0, len(batch), size)
        for start in reversed(starts) if one_by_one else starts:
            examples = batch[start : start + size]
            dropout.enter(step, start, [len(example.tokens) for example in examples])
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
    return SoloResult(losses, initial, _adapter_of(peft_model), step_s)


def _with_adapter(backbone: PreTrainedModel, model: ModelSpec, task: PeftTask) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  # seconds to import

    lora = task.peft
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if lora.targets == ("all-linear",) else list(lora.targets),
        lora_dropout=lora.dropout,
        fan_in_fan_out=model.transposed_weights,
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(task.seed)
        peft_model: torch.nn.Module = get_peft_model(backbone, config)
    return peft_model.eval()  # the frozen backbone's own dropouts are off, as in the runtime


def _adapter_of(peft_model: torch.nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict  # noqa: PLC0415  # seconds to import

    return {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(peft_model).items()}


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
    ).logits
    labels_BS = torch.from_numpy(labels)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
