"""What a rank learns of another one that is gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from muxtune.support.errors import RunError

T = TypeVar("T")

# As gloo, torch's stores and NCCL put it (torch 2.13); gloo has no class of its own for a closed connection.
_SILENCE = re.compile(
    r"timed out|timeout (after|waiting)|(wait|socket|read|write|connect|application|operation) timeout",
    re.IGNORECASE,
)
_BREAK = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|no route to host|got 0 bytes"
    r"|remote process exited|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)


class PeerLostError(RunError):
    """A neighbouring rank is gone; its own error, not this one, is the cause."""


def or_peer_lost(call: Callable[[], T], rank: int | None = None) -> T:
    """Result of a call of torch.distributed.

    Args:
        call: Call to make.
        rank: Rank that it waits for; None if that is several ranks.

    Raises:
        PeerLostError: A connection was closed, or nothing came in time.
        RuntimeError: Whatever else failed: that is this rank's own.
    """
    try:
        return call()
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # a kernel may have "timed out", too
        raise
    except RuntimeError as error:
        peer = "another rank" if rank is None else f"rank {rank}"
        if _SILENCE.search(str(error)):
            raise PeerLostError(f"{peer} did not answer: {error}") from error
        if _BREAK.search(str(error)):
            raise PeerLostError(f"the connection to {peer} broke: {error}") from error
        raise
