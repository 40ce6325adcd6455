"""Sums over the ranks of a team: shards of a stage, stages of a replica, or replicas."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.schedule import Action
from runtime.device.stopwatch import HostStopwatch, Mark, Stopwatch
from runtime.distributed.peers import or_peer_lost


class Team(Protocol):
    """Ranks that combine tensors, element by element and in place, with the same bits on all of them."""

    def sum_(self, tensor: Tensor) -> None:
        """Add up what all ranks have."""

    def max_(self, tensor: Tensor) -> None:
        """Take the largest that any rank has."""


@dataclass(frozen=True, slots=True)
class GroupTeam:
    """The ranks of a process group; all methods raise :class:`PeerLostError` if one of them is gone."""

    group: dist.ProcessGroup
    peer: int | None = field(init=False)
    """The other rank of a team of two, which alone can be late; None in larger teams."""

    def __post_init__(self) -> None:
        others = [rank for rank in dist.get_process_group_ranks(self.group) if rank != dist.get_rank()]
        object.__setattr__(self, "peer", others[0] if len(others) == 1 else None)
        # NCCL joins ranks at their first sum. That stops their GPUs, which must not happen in the middle of a
        # run, while a receive waits there for what comes later.
        if dist.get_backend(self.group) == "nccl":
            self.sum_(torch.zeros(1, device="cuda"))

    def sum_(self, tensor: Tensor) -> None:
        """Add up what all ranks have."""
        self.launch(tensor, dist.ReduceOp.SUM)()

    def max_(self, tensor: Tensor) -> None:
        """Take the largest that any rank has."""
        self.launch(tensor, dist.ReduceOp.MAX)()

    def launch(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Callable[[], object]:
        """Start to combine a tensor, which is not to be touched until the result has been called.

        Returns:
            Waits for the end. On CUDA it makes the current stream wait, not the host.
        """
        if not tensor.numel():  # a micro-batch may be empty, on all ranks alike
            return _nothing
        return partial(or_peer_lost, self.begin(tensor, op).wait, self.peer)

    def begin(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> dist.Work:
        """Start to combine a tensor, and say how far that is."""
        work: dist.Work | None = or_peer_lost(
            partial(dist.all_reduce, tensor, op, group=self.group, async_op=True), self.peer
        )
        assert work is not None  # None only for ranks outside of the group
        return work


def _nothing() -> None:
    """Wait for nothing."""


TRACED_COLLECTIVES = 20_000
"""Collectives of a rank that its trace has, at most; a long run has millions."""


class Collective(NamedTuple):
    """A sum over the ranks of a stage, by marks of a stopwatch."""

    action: Action
    launched: Mark
    waited_from: Mark
    """Moment from which on the rank had nothing else to do."""
    done: Mark


class StageTeam:
    """The ranks that share a stage; while they sum, another body of a relay may compute.

    Args:
        team: Ranks that share the stage.
        stopwatch: Stopwatch of the rank; the host's by default.
    """

    def __init__(self, team: GroupTeam, stopwatch: Stopwatch | None = None) -> None:
        self._team = team
        self.stopwatch = HostStopwatch() if stopwatch is None else stopwatch
        self.pause: Callable[[], None] | None = None
        """Called between the launch of a sum and the wait for it, where bodies take turns."""
        self.action: Action | None = None
        """What the rank is doing; None where sums are nobody's."""
        self.noted = True
        """Whether sums are; one rank of a stage is enough."""
        self.collectives: list[Collective] = []
        """The first :data:`TRACED_COLLECTIVES`."""
        self._waits: deque[Collective] = deque()

    def settle(self, *, wait: bool = False) -> dict[Action, int]:
        """Nanoseconds that actions waited for sums, of waits that have passed since the last call, or all."""
        watch, exposed_ns = self.stopwatch, defaultdict[Action, int](int)
        while self._waits and (wait or watch.has_passed(self._waits[0].done)):
            action, _, waited_from, done = self._waits.popleft()
            exposed_ns[action] += round((watch.seconds(done) - watch.seconds(waited_from)) * 1e9)
        return exposed_ns

    def sum_(self, tensor: Tensor) -> None:
        """Add up what all ranks have; others may get a turn meanwhile."""
        self._combine(tensor, dist.ReduceOp.SUM, self.pause)

    def max_(self, tensor: Tensor) -> None:
        """Take the largest that any rank has; a few numbers, nobody gets a turn for them."""
        self._combine(tensor, dist.ReduceOp.MAX, None)

    def _combine(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, pause: Callable[[], None] | None) -> None:
        if not tensor.numel():  # a micro-batch may be empty, on all ranks alike
            return
        action = self.action
        launched = self.stopwatch.now()
        wait = self._team.launch(tensor, op)
        if pause is not None:
            pause()
        waited_from = self.stopwatch.now()
        wait()
        if action is None or not self.noted:
            return
        collective = Collective(action, launched, waited_from, self.stopwatch.now())
        self._waits.append(collective)
        if len(self.collectives) < TRACED_COLLECTIVES:
            self.collectives.append(collective)
