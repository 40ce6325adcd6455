"""Tiny backbones, tasks and micro-batches, and a solo reference against transformers and peft alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation

from muxtune.batches import Alignment, HTaskShape, group_tokens, layout_step
from muxtune.model import ModelSpec
from muxtune.peft.lora import LoraSpec
from muxtune.tasks import DatasetSpec, Example, PeftTask
from runtime.tasks.adapter_files import initial_adapter, load_adapter

LLAMA = ModelSpec(
    name="llama-test",
    family="llama",
    source="preset",
    layers=4,
    hidden=24,
    ffn=40,
    heads=4,
    kv_heads=2,
    head_dim=8,  # not hidden / heads
    vocab=50,
    max_positions=128,
    activation="silu",
    norm_eps=1e-5,
    attention_bias=True,
    mlp_bias=True,
    dtype="float64",
)
GPT2 = ModelSpec(
    name="gpt2-test",
    family="gpt2",
    source="preset",
    layers=4,
    hidden=24,
    ffn=56,
    heads=3,
    kv_heads=3,
    head_dim=8,
    vocab=50,
    max_positions=128,
    activation="gelu_new",
    norm_eps=1e-5,
    tied_embeddings=True,
    attention_bias=True,
    mlp_bias=True,
    dtype="float64",
)
OPT = GPT2.model_copy(update={"name": "opt-test", "family": "opt", "activation": "relu"})
BACKBONES = {spec.family: spec for spec in (LLAMA, GPT2, OPT)}


def make_task(task_id: str, *, r: int = 4, targets: tuple[str, ...] = ("all-linear",), **changes) -> PeftTask:
    fields = {
        "id": task_id,
        "peft": LoraSpec(method="lora", r=r, alpha=2.0 * r, targets=targets),
        "dataset": DatasetSpec(lengths="sst2"),
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 32,
        "learning_rate": 1e-3,
        "steps": 3,
        "seed": r,
    }
    return PeftTask.model_validate(fields | changes)


@dataclass(frozen=True)
class Tenant:
    task: PeftTask
    examples: list[Example]
    adapter: dict[str, torch.Tensor]
    folder: Path


def make_tenant(spec: ModelSpec, task: PeftTask, lengths: Sequence[int], folder: Path) -> Tenant:
    """A task with random examples, and an adapter whose B is not zero (it would hide gradients of A)."""
    generator = np.random.default_rng(task.seed)
    examples = [
        Example(generator.integers(0, spec.vocab, length), int(generator.integers(1, length)))
        for length in lengths
    ]
    initial_adapter(spec, task, folder)
    torch.manual_seed(task.seed)
    trained = {key: value for key, value in load_adapter(folder).items() if value.is_floating_point()}
    moved = {key: value + 0.1 * torch.randn_like(value) for key, value in trained.items()}
    adapter = load_adapter(folder) | moved
    return Tenant(task, examples, adapter, folder)


def lay_out(tenants: Sequence[Tenant], alignment: Alignment, chunk_tokens: int = 32):
    """All examples of all tasks in one micro-batch, with a few spare tokens at its end."""
    lengths = [np.array([len(example.tokens) for example in tenant.examples]) for tenant in tenants]
    row = {"pad": max(int(each.max()) for each in lengths) + 1, "pack": None, "chunk": chunk_tokens}[
        alignment
    ]
    groups = [[list(range(len(each)))] for each in lengths]
    needed = sum(
        group_tokens(each, dealt, alignment, row)[0] for each, dealt in zip(lengths, groups, strict=True)
    )
    shape = HTaskShape(alignment=alignment, row_tokens=row, microbatches=1, tokens=needed + 3)
    (layout,) = layout_step(shape, lengths)
    return layout


def solo_losses(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all targets, one sequence after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        tokens = torch.from_numpy(example.tokens)
        logits = model(input_ids=tokens[None]).logits[0, example.target_start - 1 : -1]
        total = total + F.cross_entropy(logits, tokens[example.target_start :], reduction="sum")
    return total
