"""What a rank learns of another one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from muxtune.errors import RunError

T = TypeVar("T")


class PeerLostError(RunError):
    """A neighbouring rank is gone; its own error, not this one, is the cause."""


def or_peer_lost(call: Callable[[], T], rank: int | None = None) -> T:
    """Result of a call of torch.distributed.

    Args:
        call: What to do.
        rank: Whom it waits for; None if that is several ranks.

    Raises:
        PeerLostError: The call failed.
    """
    try:
        return call()
    except RuntimeError as error:  # gloo has no class of its own for a closed connection
        peer = "another rank" if rank is None else f"rank {rank}"
        what = f"{peer} did not answer" if "Timed out" in str(error) else f"the connection to {peer} broke"
        raise PeerLostError(f"{what}: {error}") from error
