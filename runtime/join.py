"""Being one rank of a job that torchrun started: refusing together, and failing in one voice.

A torchrun ends the ranks of its own node as soon as one of them has failed, and lists the failed ones. Ranks
of other nodes only see that a connection broke. So the rank that has a cause tells it; a rank that lost
another one waits to be ended, and otherwise leaves a line for its torchrun to show.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from muxtune.errors import MuxTuneError, RunError, UserError
from runtime.peers import PeerLostError
from runtime.transport import meet

T = TypeVar("T")

END_WAIT_S = 3.0
"""How long a rank that lost another one waits for its torchrun, which looks ten times a second."""


@contextmanager
def joined(rank: int, world: int, peer_timeout_s: float) -> Iterator[None]:
    """Connect the ranks of torchrun's job, and part when all are done.

    Args:
        rank: Our own.
        world: How many there are.
        peer_timeout_s: How long to wait for another rank's message.

    Raises:
        UserError: From inside, with the rank in front.
        RunError: Likewise.
        PeerLostError: Another rank has the cause, and torchrun shows what we know of it.
    """
    try:
        if world > 1:
            _connect(peer_timeout_s)
        yield
        meet()
    except PeerLostError as error:
        time.sleep(END_WAIT_S)
        if _leave_word(f"rank {rank} ended: {error}"):
            raise
        raise RunError(f"rank {rank}: {error}") from error
    except MuxTuneError as error:
        kind = UserError if isinstance(error, UserError) else RunError
        raise kind(f"rank {rank}: {error}") from error
    if dist.is_initialized():
        dist.destroy_process_group()


def together(action: Callable[[], T]) -> T:
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
    refused = [rank for rank, had in enumerate(share(refusal is not None)) if had]
    if not refused:
        return result
    if refusal is not None and (not dist.is_initialized() or refused[0] == dist.get_rank()):
        raise refusal
    raise PeerLostError(f"rank {refused[0]} refused the run, and says why")


def share(value: T) -> list[T]:
    """Values of all ranks, in order, on every rank. Values of any kind that pickles.

    Raises:
        PeerLostError: A rank is gone.
    """
    values = [value]
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo has no class of its own for a closed connection
            raise PeerLostError(f"the connection to another rank broke: {error}") from error
    return values


def _connect(peer_timeout_s: float) -> None:
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=peer_timeout_s))
    except RuntimeError as error:
        raise PeerLostError(f"no connection to the other ranks: {error}") from error


def _leave_word(message: str) -> bool:
    """Have torchrun show a message beside the exit code; False if no torchrun asks for one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    line = " ".join(message.split())
    Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    return True
