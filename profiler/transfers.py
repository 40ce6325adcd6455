"""Measures transfers between two ranks, as the runtime makes them: isend, and irecv posted beforehand."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from profiler.timing import MIN_REPETITIONS, Sample, summarize

if TYPE_CHECKING:
    from torch import Tensor

_MAX_REPETITIONS = 200
_WARM_UP = 3
_TIMEOUT = timedelta(seconds=60)


class PingPong:
    """Two ranks that send a message back and forth over gloo.

    Args:
        path: File that the two meet in; must not exist before.
        rank: 0 or 1.
    """

    def __init__(self, path: Path, rank: int) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._rank = rank
        self._peer = 1 - rank
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=_TIMEOUT
        )

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()

    def measure(self, bytes_: int, limit_s: float) -> Sample | None:
        """Half of a round trip, until the receiver has the message; both ranks call it.

        Returns:
            Timings on rank 0, None on rank 1.
        """
        import torch

        sent, received = torch.ones(bytes_, dtype=torch.uint8), torch.empty(bytes_, dtype=torch.uint8)
        warm_s = [self._round_trip_s(sent, received) for _ in range(_WARM_UP)]
        affordable = int(limit_s / max(min(warm_s), 1e-9))
        count = torch.tensor([max(MIN_REPETITIONS, min(_MAX_REPETITIONS, affordable))])
        self._dist.broadcast(count, 0)  # both must do equally many
        times_s = [self._round_trip_s(sent, received) / 2 for _ in range(int(count))]
        return summarize(times_s) if self._rank == 0 else None

    def _round_trip_s(self, sent: Tensor, received: Tensor) -> float:
        posted = self._dist.irecv(received, self._peer)
        assert posted is not None  # None is for ranks outside the group
        start_s = time.perf_counter()
        if self._rank == 1:
            posted.wait()
        leaving = self._dist.isend(sent, self._peer)
        assert leaving is not None
        if self._rank == 0:
            posted.wait()
        elapsed_s = time.perf_counter() - start_s
        leaving.wait()
        return elapsed_s
