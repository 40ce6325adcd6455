"""Sums over the ranks of a team: shards of a stage, stages of a replica, or replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from runtime.peers import or_peer_lost


class Team(Protocol):
    """Ranks that combine tensors, element by element and in place, with the same bits on all of them."""

    def sum_(self, tensor: Tensor) -> None:
        """Add up what all ranks have."""

    def max_(self, tensor: Tensor) -> None:
        """Take the largest that any rank has."""


@dataclass(frozen=True, slots=True)
class GroupTeam:
    """The ranks of a process group; both methods raise :class:`PeerLostError` if one of them is gone."""

    group: dist.ProcessGroup

    def sum_(self, tensor: Tensor) -> None:
        """Add up what all ranks have."""
        self._combine(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        """Take the largest that any rank has."""
        self._combine(tensor, dist.ReduceOp.MAX)

    def _combine(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if tensor.numel():  # a micro-batch may be empty, on all ranks alike
            or_peer_lost(lambda: dist.all_reduce(tensor, op, group=self.group))
