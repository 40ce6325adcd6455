"""Tasks of any methods trained together in one process, and each alone as its reference says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muxtune.batches import Alignment
from muxtune.model import ModelSpec
from muxtune.peft import PeftSpec
from muxtune.tasks import Example, PeftTask
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import WHOLE, Shard, assemble
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from runtime.tasks.gradients import squared_gradient_norms, sum_over_shards
from runtime.tasks.tenant import Tenant as Trained
from tests.runtime.worlds import Tenant, lay_out, make_task, solo_losses

LENGTHS = ([3, 17, 5], [20, 2], [9], [12, 4, 6], [7, 11])
"""Tokens of the sequences of each task."""


@dataclass(frozen=True)
class Result:
    losses: list[float]
    adapter: dict[str, Tensor]


def random_weights(spec: ModelSpec):
    """Biases and norms, which transformers sets to 0 and 1, are moved, so that forgetting them shows."""
    from runtime.backbone.hugging_face import load_hf_model

    weights = load_hf_model(spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in weights.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return weights


def make_tenants(spec: ModelSpec, pefts: Sequence[PeftSpec], folder: Path, **fields) -> list[Tenant]:
    """Tasks with these methods, random examples, and the adapters that they start from."""
    tenants = []
    for i, peft in enumerate(pefts):
        changes = {"learning_rate": 1e-2, "seed": i + 1, "steps": 20} | fields
        task: PeftTask = make_task(f"t{i}", **changes).model_copy(update={"peft": peft})
        generator = np.random.default_rng(i)
        examples = [
            Example(generator.integers(0, spec.vocab, n), int(generator.integers(1, n))) for n in LENGTHS[i]
        ]
        initial_adapter(spec, task, folder / task.id)
        tenants.append(Tenant(task, examples, load_adapter(folder / task.id), folder / task.id))
    return tenants


def targets_of(tenant: Tenant) -> int:
    return sum(len(example.tokens) - example.target_start for example in tenant.examples)


def train_together(
    spec: ModelSpec,
    tenants: Sequence[Tenant],
    weights,
    *,
    steps: int,
    alignment: Alignment = "pack",
    shard: Shard = WHOLE,
) -> tuple[list[list[float]], list[dict]]:
    """Losses of each task and step, and each task's parts of its adapter, of one rank that has all layers."""
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights, shard=shard)
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
    batch = build_microbatch(
        lay_out(tenants, alignment, 8),
        [tenant.examples for tenant in tenants],
        task_ids=[tenant.task.id for tenant in tenants],
    )
    trained = [
        Trained(t.task, stage.task_parameters(t.task.id), stage.task_portions(t.task.id)) for t in tenants
    ]
    targets_K = torch.tensor([targets_of(tenant) for tenant in tenants], dtype=torch.float64)
    losses: list[list[float]] = [[] for _ in tenants]
    for step in range(steps):
        losses_K = stage.forward(batch, None) / targets_K
        losses_K.sum().backward()
        if shard.team is not None:
            sum_over_shards(trained, shard.team)
        squares_K = squared_gradient_norms(trained)
        if shard.team is not None:
            shard.team.sum_(squares_K)
        for own, loss, each, square in zip(losses, losses_K.tolist(), trained, squares_K, strict=True):
            own.append(loss)
            each.step(step, square.sqrt())
            for parameter in each.parameters.values():
                parameter.grad = None
    parts = [{k: (t.portions[k], p.detach()) for k, p in t.parameters.items()} for t in trained]
    return losses, parts


def together(spec, tenants, weights, *, steps: int, alignment: Alignment = "pack") -> list[Result]:
    losses, parts = train_together(spec, tenants, weights, steps=steps, alignment=alignment)
    return [Result(own, assemble([part])) for own, part in zip(losses, parts, strict=True)]


def alone(module: torch.nn.Module, state, tenant: Tenant, *, steps: int) -> Result:
    """A task trained by a model of transformers with its adapter.

    Args:
        module: The model; what is trained requires gradients.
        state: Gives the adapter under the keys of its file.
        tenant: The task.
        steps: Optimizer steps.
    """
    task = tenant.task
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay)
    losses = []
    for _ in range(steps):
        loss = solo_losses(module, tenant.examples) / targets_of(tenant)
        loss.backward()
        if task.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Result(losses, state())


def assert_same(ours: Result, theirs: Result, tolerance: float = 1e-9) -> None:
    """Losses and adapters within a relative and absolute tolerance."""
    torch.testing.assert_close(
        torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=tolerance, atol=tolerance
    )
    fixed = {key for key, tensor in theirs.adapter.items() if not tensor.is_floating_point()}
    assert ours.adapter.keys() == theirs.adapter.keys() - fixed
    for key, tensor in ours.adapter.items():
        torch.testing.assert_close(tensor, theirs.adapter[key], rtol=tolerance, atol=tolerance)
