"""Agreement of all ranks: on values, on one point in time, and on refusing a run."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from muxtune.support.errors import UserError
from runtime.distributed.peers import PeerLostError, or_peer_lost

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Values of all ranks on rank 0, in order; nothing elsewhere. Values of any kind that pickles.

    Raises:
        PeerLostError: A rank is gone.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[T] | None = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    or_peer_lost(lambda: dist.gather_object(value, gathered))
    return gathered or []


def barrier() -> None:
    """Wait for all ranks.

    Raises:
        PeerLostError: A rank is gone.
    """
    if dist.is_initialized():
        or_peer_lost(dist.barrier)


def common_origin_ns() -> int:
    """A reading of ``time.perf_counter_ns`` that means the same moment on all ranks.

    Ranks of one machine share that clock; another machine's clock is read at the end of a barrier.
    """
    if not dist.is_initialized():
        return time.perf_counter_ns()
    barrier()
    own = (platform.node(), uuid.getnode(), time.perf_counter_ns())
    readings = [own] * dist.get_world_size()
    or_peer_lost(lambda: dist.all_gather_object(readings, own))
    return readings[0][2] if readings[0][:2] == own[:2] else own[2]


def refuse_together(action: Callable[[], T]) -> T:
    """Do something on every rank, and go on only if no rank refused; the first one that did says why.

    Args:
        action: What to do; it talks to no other rank.

    Returns:
        The result on this rank.

    Raises:
        UserError: What the action raised here.
        PeerLostError: It raised on another rank.
    """
    refusal: UserError | None = None
    try:
        result = action()
    except UserError as error:
        refusal = error
    refused = [rank for rank, had in enumerate(all_gather(refusal is not None)) if had]
    if not refused:
        return result
    if refusal is not None and (not dist.is_initialized() or refused[0] == dist.get_rank()):
        raise refusal
    raise PeerLostError(f"rank {refused[0]} refused the run, and says why")


def all_gather(value: T) -> list[T]:
    """Values of all ranks, in order, on every rank. Values of any kind that pickles.

    Raises:
        PeerLostError: A rank is gone.
    """
    values = [value]
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        or_peer_lost(lambda: dist.all_gather_object(values, value))
    return values
