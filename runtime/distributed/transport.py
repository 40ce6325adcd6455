"""Tensors between neighbouring stages, point-to-point.

Forward tensors go from stage s to s + 1, gradients back. All stages play the same order of forwards and of
backwards, so each direction is a queue: nothing carries a name. Gloo and NCCL move data only once the receive
is posted, so receives are posted ahead of need where the device allows it, and the transfer runs beside the
computation.
"""

# T tokens of the micro-batch, D hidden size

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.memory.peak import POSTED_AHEAD
from runtime.device.devices import CPU, RankDevice
from runtime.distributed.peers import or_peer_lost

_TAGS = 1 << 20
"""Tags repeat after so many messages; far more than are ever under way."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two neighbouring stages, for either of them."""

    peer: int
    """Rank of the other one."""
    device: RankDevice = CPU
    """Device of the tensors."""
    group: dist.ProcessGroup | None = None
    """Group that carries this direction alone; None for the default one, where tags tell messages apart."""


class Inbox:
    """Receives of one direction, in the order in which they are needed.

    A message without tokens is not sent.

    Args:
        source: Where they come from.
        tokens: Tokens of every message to come, in order.
        hidden: Width of a token.
        dtype: Type of the elements.
    """

    def __init__(self, source: Link, tokens: Iterable[int], hidden: int, dtype: torch.dtype) -> None:
        self._source = source
        self._shapes: Iterator[tuple[int, int]] = enumerate(tokens)
        self._hidden = hidden
        self._dtype = dtype
        self._posted: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._ahead = POSTED_AHEAD if source.device.posts_ahead else 0
        for _ in range(self._ahead):
            self._post()

    @property
    def posted_bytes(self) -> int:
        """Bytes of the buffers that wait for messages."""
        return sum(tensor_TD.nbytes for tensor_TD, _ in self._posted)

    def receive(self) -> Tensor:
        """Wait for the next message, ``[T, D]``; on CUDA the current stream does, not the host.

        Raises:
            PeerLostError: The sender is gone.
        """
        if not self._ahead:
            self._post()
        tensor_TD, work = self._posted.popleft()
        if work is not None:
            or_peer_lost(work.wait, self._source.peer)
        if self._ahead:
            self._post()
        return tensor_TD

    def _post(self) -> None:
        shape = next(self._shapes, None)
        if shape is None:
            return
        number, tokens = shape
        link = self._source
        tensor_TD = torch.empty(tokens, self._hidden, dtype=self._dtype, device=link.device.name)
        work = None
        if tokens:
            receive = partial(dist.irecv, tensor_TD, link.peer, group=link.group, tag=number % _TAGS)
            work = or_peer_lost(receive, link.peer)
        self._posted.append((tensor_TD, work))


class Outbox:
    """Sends of one direction; a tensor is kept until it has left.

    Gloo tells only a waiting sender that a message has left, so the oldest is waited for once there are more
    than the receiver can have open at once. It has left by then: the wait takes 11 us and never blocks. On
    CUDA the current stream waits, in which the tensor's memory may then be used again.

    Args:
        target: Where they go.
        room: Messages kept at most: micro-batches that may be open where they end, be it their backward
            (activations) or their forward (gradients).
    """

    def __init__(self, target: Link, room: int) -> None:
        self._target = target
        self._room = room
        self._number = 0
        self._under_way: deque[tuple[Tensor, dist.Work]] = deque()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the messages that are not known to have left."""
        return sum(tensor_TD.nbytes for tensor_TD, _ in self._under_way)

    def send(self, tensor_TD: Tensor) -> None:
        """Send without waiting for this message to leave.

        Raises:
            PeerLostError: The receiver is gone.
        """
        while len(self._under_way) >= self._room:
            self._wait_for_oldest()
        tensor_TD = tensor_TD.contiguous()
        tag = self._number % _TAGS
        self._number += 1
        if not tensor_TD.numel():
            return
        link = self._target
        work = or_peer_lost(partial(dist.isend, tensor_TD, link.peer, group=link.group, tag=tag), link.peer)
        assert work is not None  # None only for ranks outside of the group
        self._under_way.append((tensor_TD, work))

    def flush(self) -> None:
        """Wait until everything has left.

        Raises:
            PeerLostError: The receiver is gone.
        """
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        or_peer_lost(self._under_way.popleft()[1].wait, self._target.peer)


def open_link(link: Link, *, sends: bool) -> None:
    """Exchange a first message, which joins the two ranks; both have to call this.

    Args:
        link: Direction between the two ranks.
        sends: Whether this rank is the one that sends in it.

    Raises:
        PeerLostError: The other one is gone.
    """
    exchange = dist.isend if sends else dist.irecv
    tensor = torch.zeros(1, device=link.device.name)
    work = or_peer_lost(partial(exchange, tensor, link.peer, group=link.group), link.peer)
    assert work is not None  # None only for ranks outside of the group
    or_peer_lost(work.wait, link.peer)
