"""One task's trainable part on one stage: its adapter and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from muxtune.support.errors import SpecError
from muxtune.tasks import PeftTask
from runtime.distributed.sharding import Portion
from runtime.tasks.optimizer import build_optimizer, learning_rate


class TenantSnapshot(TypedDict):
    """Copy of a tenant's state; nothing in it changes when training goes on."""

    adapter: dict[str, Tensor]
    """Tensors under PEFT's keys; only this stage's layers, and this rank's part of them."""
    optimizer: dict[str, dict[str, Tensor]]
    """State by the optimizer's name (``exp_avg``), under the same keys; what else it has follows from the
    task."""


class Tenant:
    """Steps one task, independently of all others.

    Args:
        task: Task whose adapter it is.
        parameters: This rank's part of the adapter, under PEFT's keys.
        portions: What of the whole tensors they are; by default all.
        device: Where they are, for a stage that has none of them.
        changed: Called when they have changed: :meth:`runtime.backbone.stage.Stage.renew`.
    """

    def __init__(
        self,
        task: PeftTask,
        parameters: Mapping[str, nn.Parameter],
        portions: Mapping[str, Portion] | None = None,
        *,
        device: str = "cpu",
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.task = task
        self.stop = task.steps
        """Takes part in the steps before this one; in fewer than its task has, if it has failed."""
        self.failure: str | None = None
        """Why it has failed."""
        self._changed = changed
        self.parameters = dict(parameters)
        self.portions = (
            {key: Portion.all_of(p) for key, p in parameters.items()} if portions is None else dict(portions)
        )
        self.optimizer = build_optimizer(list(self.parameters.values()), task) if parameters else None
        """None on a stage that has no tensor of the task."""
        some = next(iter(self.parameters.values()), torch.empty(0, device=device))
        self.device, self._dtype = some.device, some.dtype

    def fail(self, step: int, reason: str) -> None:
        """Take part in no step after this one, which has failed."""
        self.stop = step + 1
        self.failure = reason

    @property
    def most_squared_norm(self) -> float:
        """Largest squared norm of a part of the gradient whose step may be taken.

        AdamW squares what is left of the gradient after clipping. Its second moment is a mean of such
        squares, so it stays finite as long as each of them is.
        """
        most = torch.finfo(self._dtype).max
        limit = self.task.max_grad_norm
        is_cut = limit is not None and limit * limit <= most
        return min(self.squared_limit, torch.finfo(torch.float64).max if is_cut else most)

    @property
    def squared_limit(self) -> float:
        """Largest squared norm of the whole gradient that the task allows."""
        largest, limit = torch.finfo(torch.float64).max, self.task.abort_grad_norm
        return largest if limit is None else min(largest, limit * limit)

    def step(self, step: int, gradient_norm: Tensor | float, refused: Tensor | None = None) -> None:
        """Optimizer step ``step`` (from 0), clipped as ``torch.nn.utils.clip_grad_norm_`` does.

        One that is refused changes neither adapter nor optimizer state; the host does not wait to learn that.

        Args:
            step: Sets the learning rate.
            gradient_norm: Gradient norm of the whole adapter, if the task has ``max_grad_norm``.
            refused: Whether it is; by default, whether the norm is too large, see :attr:`most_squared_norm`.
        """
        if self.optimizer is None:
            return
        norm = torch.as_tensor(gradient_norm, dtype=torch.float64, device=self.device)
        limit = self.task.max_grad_norm
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # a NaN stays one
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.task, step)
        # As torch's gradient scaler has a fused optimizer leave out a step, without asking the device.
        if refused is None:
            refused = ~(norm.square() <= self.most_squared_norm)  # a NaN is at most nothing
        self.optimizer.found_inf = refused.float()  # type: ignore[attr-defined]  # not in stub
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._changed()

    def is_finite(self) -> bool:
        """Whether all of adapter and optimizer state is; waits for the device."""
        return is_finite(self._state(copied=False))

    def snapshot(self) -> TenantSnapshot:
        """Copy of adapter and optimizer state, on CPU."""
        return self._state(copied=True)

    def _state(self, *, copied: bool) -> TenantSnapshot:
        adapter = {key: _on_cpu(p) if copied else p.detach() for key, p in self.parameters.items()}
        optimizer: dict[str, dict[str, Tensor]] = {}
        for key, parameter in self.parameters.items():
            state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
            for name, value in state.items():
                optimizer.setdefault(name, {})[key] = _on_cpu(value) if copied else value
        return TenantSnapshot(adapter=adapter, optimizer=optimizer)

    def restore(self, snapshot: TenantSnapshot) -> None:
        """Continue from a snapshot, bit by bit.

        Raises:
            SpecError: It is not one of this task on this rank.
        """
        for name, group in (("adapter", snapshot["adapter"]), *snapshot["optimizer"].items()):
            self._check_fits(name, group)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(snapshot["adapter"][key])
                if self.optimizer is not None:
                    self.optimizer.state[parameter] = {
                        name: group[key].to(parameter.device, copy=True)
                        for name, group in snapshot["optimizer"].items()
                    }
        self._changed()

    def _check_fits(self, name: str, group: Mapping[str, Tensor]) -> None:
        where = f"checkpoint of task {self.task.id}: {name}"
        if group.keys() != self.parameters.keys():
            odd = min(group.keys() ^ self.parameters.keys())
            raise SpecError(where, odd, "the tensors of this stage's adapter")
        for key, parameter in self.parameters.items():
            shape, expected = tuple(group[key].shape), tuple(parameter.shape)
            if shape not in ({()} if name == "step" else {expected}):
                raise SpecError(f"{where} {key}", shape, f"the shape {expected}")

    @property
    def adapter_bytes(self) -> int:
        """Bytes of this rank's part of the adapter; its gradients take the same."""
        return sum(p.nbytes for p in self.parameters.values())

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state, once there is any."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def is_finite(snapshot: TenantSnapshot) -> bool:
    """Whether all numbers of a snapshot are finite."""
    groups = (snapshot["adapter"], *snapshot["optimizer"].values())
    return all(bool(tensor.isfinite().all()) for group in groups for tensor in group.values())


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, wherever the tensor lives."""
    return tensor.detach().to("cpu", copy=True)
