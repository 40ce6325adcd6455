"""Ranks that start: they come seconds apart, so they wait for each other longer than for a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from runtime.distributed.peers import or_peer_lost

if TYPE_CHECKING:
    from runtime.device.torch_internals import Store

START_TIMEOUT_S = 60.0
"""How long ranks wait for each other, at least, until all of them train. On a busy machine it takes one rank
several seconds longer than another to import torch."""


def meet(store: Store, rank: int, world: int, peer_timeout_s: float) -> None:
    """Make the default group, once all ranks have come to a store.

    Args:
        store: Store that all ranks share.
        rank: Rank of this process.
        world: Number of ranks.
        peer_timeout_s: How long to wait for another rank's message from then on.

    Raises:
        PeerLostError: Another rank does not come.
    """
    patience = timedelta(seconds=max(START_TIMEOUT_S, peer_timeout_s))
    store.set(f"started/{rank}", "")
    or_peer_lost(partial(store.wait, [f"started/{other}" for other in range(world)], patience))
    timeout = timedelta(seconds=peer_timeout_s)
    or_peer_lost(
        partial(dist.init_process_group, "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    )


@contextmanager
def patient_collectives(peer_timeout_s: float) -> Iterator[None]:
    """Inside, collectives of all ranks wait as long as a start may take.

    Args:
        peer_timeout_s: How long they wait otherwise.
    """
    if not dist.is_initialized():
        yield
        return
    group = dist.group.WORLD
    assert group is not None
    group.set_timeout(timedelta(seconds=max(START_TIMEOUT_S, peer_timeout_s)))
    try:
        yield
    finally:
        group.set_timeout(timedelta(seconds=peer_timeout_s))
