"""One task's trainable part on one stage: its adapter and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from muxtune.workload import PeftTask
from runtime.optim import build_optimizer, learning_rate
from runtime.sharding import Cut


class TenantSnapshot(TypedDict):
    """Copy of a tenant's state; nothing in it changes when training goes on."""

    adapter: dict[str, Tensor]
    """Under PEFT's keys; only this stage's layers, and this rank's part of them."""
    optimizer: dict[str, object]


class Tenant:
    """Steps one task, independently of all others.

    Args:
        task: Whose adapter.
        parameters: This rank's part of it, under PEFT's keys.
        cuts: What of the whole tensors they are; by default all.
    """

    def __init__(
        self,
        task: PeftTask,
        parameters: Mapping[str, nn.Parameter],
        cuts: Mapping[str, Cut] | None = None,
    ) -> None:
        self.task = task
        self.parameters = dict(parameters)
        self.cuts = {key: Cut.all_of(p) for key, p in parameters.items()} if cuts is None else dict(cuts)
        self.optimizer = build_optimizer(list(self.parameters.values()), task)

    def squared_gradient_norm(self) -> Tensor:
        """Sum of squares of this rank's gradients; its share of what other ranks of the stage have too.

        Returns:
            A float64 number on their device; nothing waits for it.
        """
        some = next(iter(self.parameters.values()))
        total = some.new_zeros((), dtype=torch.float64)
        for key, parameter in self.parameters.items():
            if parameter.grad is not None:
                total += parameter.grad.double().square().sum() / self.cuts[key].holders
        return total

    def step(self, step: int, gradient_norm: float | None) -> None:
        """Optimizer step ``step`` (from 0), clipped as ``torch.nn.utils.clip_grad_norm_`` does.

        Args:
            step: Sets the learning rate.
            gradient_norm: Of the whole adapter; needed if the task has ``max_grad_norm``.
        """
        limit = self.task.max_grad_norm
        if limit is not None:
            assert gradient_norm is not None
            factor = min(1.0, limit / (gradient_norm + 1e-6))
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.task, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> TenantSnapshot:
        """Copy of adapter and optimizer state, on CPU."""
        adapter = {key: _on_cpu(parameter) for key, parameter in self.parameters.items()}
        return TenantSnapshot(adapter=adapter, optimizer=_cloned(self.optimizer.state_dict()))

    def restore(self, snapshot: TenantSnapshot) -> None:
        """Continue from a snapshot, bit by bit."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(snapshot["adapter"][key])
        self.optimizer.load_state_dict(snapshot["optimizer"])

    @property
    def adapter_bytes(self) -> int:
        """Bytes of this rank's part of the adapter; its gradients take the same."""
        return sum(p.nbytes for p in self.parameters.values())

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state, once there is any."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def _cloned(state: dict[str, object]) -> dict[str, object]:
    """Deep copy of an optimizer's ``state_dict``, whose tensors alias the live ones, on CPU."""
    return {key: _clone(value) for key, value in state.items()}


def _clone(value: object) -> object:
    if isinstance(value, Tensor):
        return _on_cpu(value)
    if isinstance(value, dict):
        return {key: _clone(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_clone(each) for each in value]
    return value


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, wherever the tensor lives."""
    return tensor.detach().to("cpu", copy=True)
