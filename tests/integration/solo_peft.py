"""The reference: one task trained alone with transformers and peft, or plain torch, and nothing of ours.

Written from the texts of docs/files.md ("Workload") and docs/runtime.md ("What a task's result is"), sequence
by sequence, so that it shares neither code nor data structures with what it judges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from tests.integration.solo_adapters import attach_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class SoloTask:
    """A task in plain numbers; the defaults are those of the text."""

    model_dir: Path
    dtype: str
    byte_tokens: bool
    """Tokens are bytes, BOS 256 and EOS 257, instead of those of the directory's tokenizer."""
    dataset: Path
    peft: str
    """``peft`` of the task as in a workload file, as JSON."""
    global_batch_size: int
    max_length: int
    learning_rate: float
    steps: int
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    seed: int = 0
    shuffle: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    exact: bool = False
    """Computed in float64, from weights and an initial adapter as they are in ``dtype``."""
    one_batch: bool = False
    """All sequences of a step in one padded batch instead of one by one; with dropout, whose masks are a
    sequence's own, one by one in reverse order. The same but for rounding."""
    float32_adapter: bool = True
    """PEFT keeps the adapter of a bfloat16 backbone in float32, unless it is told not to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoloResult:
    """What the task does when it is alone."""

    losses: list[float]
    """Per step, before it."""
    target_tokens: list[int]
    """Per step."""
    gradient_norms: list[float]
    """Per step, before clipping; empty for a task that does not clip."""
    initial_adapter: dict[str, Tensor]
    adapter: dict[str, Tensor]
    saved_adapter: Path
    """Folder that PEFT's ``save_pretrained`` wrote, if it has the method."""
    first_tokens: list[int]
    """Tokens of the first example of the file."""
    first_logits: Tensor
    """Of the trained model for them, ``[tokens, vocabulary]``."""


Example = tuple[list[int], int]
"""Tokens, and the position of the first target among them."""


def train_solo(task: SoloTask, folder: Path) -> SoloResult:
    """Train a task and save its adapter in ``folder``."""
    examples = read_examples(task)
    model = load_backbone(task)
    fields = json.loads(task.peft)
    adapter = attach_adapter(model, fields, task.seed, float32_adapter=task.float32_adapter)
    initial = adapter.state()
    if task.exact:
        adapter.module.double()
    parameters = [parameter for parameter in adapter.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=task.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=task.weight_decay
    )
    scheduler = get_scheduler(
        "constant_with_warmup" if task.lr_schedule == "constant" else task.lr_schedule,
        optimizer,
        num_warmup_steps=task.warmup_steps,
        num_training_steps=task.steps,
    )
    losses, target_tokens, norms = [], [], []
    order = example_order(task, len(examples))
    for step in range(task.steps):
        start = step * task.global_batch_size
        batch = [examples[i] for i in order[start : start + task.global_batch_size]]
        targets = sum(len(tokens) - first for tokens, first in batch)
        total = 0.0
        groups = [[sequence] for sequence in range(len(batch))]
        if task.one_batch:
            groups = groups[::-1] if fields.get("dropout") else [list(range(len(batch)))]
        for group in groups:
            adapter.enter(step, group[0])
            nll = _nll_sum(adapter.module, [batch[sequence] for sequence in group])
            (nll / targets).backward()
            total += nll.item()
        losses.append(total / targets)
        target_tokens.append(targets)
        if task.max_grad_norm is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    adapter.save(folder)
    first_tokens = examples[0][0]
    return SoloResult(
        losses=losses,
        target_tokens=target_tokens,
        gradient_norms=norms,
        initial_adapter=initial,
        adapter=adapter.state(),
        saved_adapter=folder,
        first_tokens=first_tokens,
        first_logits=logits_of(adapter.module, first_tokens),
    )


def _nll_sum(model: torch.nn.Module, batch: list[Example]) -> Tensor:
    """Negative log-likelihood of all targets; shorter sequences are padded on the right and masked."""
    longest = max(len(tokens) for tokens, _ in batch)
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in batch])
    many = {"attention_mask": mask} if len(batch) > 1 else {}
    logits = model(input_ids=ids, **many).logits[:, -longest:]  # virtual tokens stand in front
    if logits.dtype == torch.bfloat16:
        logits = logits.float()  # as transformers' own loss does
    parts = [
        cross_entropy(row[first - 1 : len(tokens) - 1], torch.tensor(tokens[first:]), reduction="sum")
        for row, (tokens, first) in zip(logits, batch, strict=True)
    ]
    return torch.stack(parts).sum()


def load_backbone(task: SoloTask) -> torch.nn.Module:
    """The directory as transformers loads it."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(task.model_dir, dtype=dtype)
    return model


def logits_with_adapter(task: SoloTask, adapter: Path, tokens: list[int]) -> Tensor:
    """Logits of the backbone with a saved adapter, loaded as any user of PEFT would."""
    return logits_of(PeftModel.from_pretrained(load_backbone(task), adapter), tokens)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """Logits of one sequence, ``[tokens, vocabulary]``."""
    logits: Tensor = model.eval()(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :]
    return logits


def read_examples(task: SoloTask) -> list[Example]:
    """BOS + tokens(prompt) + tokens(completion) + EOS of every line; too long a prompt is cut on the left.

    BOS only where the tokenizer itself puts it; neither where a text has it already.
    """
    if task.byte_tokens:
        front, eos = [256], 257
    else:
        tokenizer = AutoTokenizer.from_pretrained(task.model_dir)
        front, eos = tokenizer("")["input_ids"], tokenizer.eos_token_id
        assert front in ([], [tokenizer.bos_token_id]), "the text does not say what else becomes of it"

    def tokens_of(text: str) -> list[int]:
        if task.byte_tokens:
            return list(text.encode())
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    examples: list[Example] = []
    for line in task.dataset.read_text().splitlines():
        record = json.loads(line)
        prompt = tokens_of(record["prompt"]) if "prompt" in record else []
        targets = tokens_of(record["completion"] if "prompt" in record else record["text"])
        if front and (prompt + targets)[:1] == front:
            prompt, targets = (prompt[1:], targets) if prompt else (prompt, targets[1:])
        targets = targets if targets[-1:] == [eos] else [*targets, eos]
        room = task.max_length - len(front) - len(targets)
        assert room >= 0, "the text does not say what becomes of too long a completion"
        prompt = prompt[max(len(prompt) - room, 0) :]
        # Nothing can predict the very first token of a sequence.
        examples.append((front + prompt + targets, max(len(front + prompt), 1)))
    return examples


def example_order(task: SoloTask, examples: int) -> list[int]:
    """File order, or a permutation per epoch from one generator; steps take the next examples of it."""
    generator = torch.Generator().manual_seed(task.seed)
    order: list[int] = []
    while len(order) < task.steps * task.global_batch_size:
        order += torch.randperm(examples, generator=generator).tolist() if task.shuffle else range(examples)
    return order
