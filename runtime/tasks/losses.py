"""Losses of optimizer steps, gathered from the micro-batches that a last stage has seen."""

# K tasks that still train

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muxtune.schedule import Action
from runtime.data.feed import Feed


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Loss of one optimizer step of one task."""

    step: int
    """Number of the step, from 0."""
    loss: float
    """Token-mean negative log-likelihood over the targets of the global batch, before the step."""
    target_tokens: int
    wall_s: float
    """Seconds from the start of the run to the end of the step on the last stage."""


class LossLedger:
    """Sums of the steps that are under way.

    Args:
        feed: Knows the targets of every step.
        microbatches: Micro-batches per hTask and step.
    """

    def __init__(self, feed: Feed, microbatches: Sequence[int]) -> None:
        self._feed = feed
        self._microbatches = microbatches
        self._targets: dict[tuple[int, int], dict[str, int]] = {}
        self._nll: dict[tuple[int, int], Tensor] = {}
        self._divisors: dict[tuple[int, int], Tensor] = {}
        """Targets as tensors, made once per step: to a GPU the copy of a list stops the host."""

    def add(self, action: Action, nll_K: Tensor) -> Tensor:
        """Note a micro-batch.

        Args:
            action: Forward of the micro-batch.
            nll_K: Sum of the negative log-likelihoods of each task.

        Returns:
            Share of the micro-batch in the sum of all tasks' losses; their gradients do not touch.
        """
        step = action.number // self._microbatches[action.htask]
        key = (action.htask, step)
        if key not in self._targets:
            self._targets[key] = self._feed.target_tokens(action.htask, step)
            self._nll[key] = torch.zeros(len(self._targets[key]), dtype=torch.float64, device=nll_K.device)
            # A global batch whose sequences are all cut to their first token has nothing to learn: loss 0.
            targets = [max(n, 1) for n in self._targets[key].values()]
            self._divisors[key] = torch.tensor(targets, dtype=nll_K.dtype, device=nll_K.device)
        self._nll[key] += nll_K.detach()
        return (nll_K / self._divisors[key]).sum()

    def close(self, action: Action) -> tuple[dict[str, int], Tensor]:
        """Targets per task id, and the replica's sums ``[K]``, of a step whose micro-batches are all in."""
        key = (action.htask, action.number)
        del self._divisors[key]
        return self._targets.pop(key), self._nll.pop(key)


def step_losses(targets: dict[str, int], nll_K: Tensor) -> dict[str, tuple[float, int]]:
    """Loss and target tokens per task id.

    Args:
        targets: Target tokens per task id.
        nll_K: Sums of the negative log-likelihoods, over all replicas.
    """
    return {
        task_id: (nll / max(n, 1), n)
        for (task_id, n), nll in zip(targets.items(), nll_K.tolist(), strict=True)
    }
