"""Measures what ranks do together: messages from one to another, and collectives of a group.

Messages go as the runtime sends them: isend, and irecv posted beforehand.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from muxtune.costs.profile import SHORTEST_S, Overlap
from muxtune.graph.operators import Operator
from muxtune.model import ModelSpec
from profiler.devices import Device
from profiler.timing import MIN_REPETITIONS, Sample, summarize

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

_MAX_REPETITIONS = 200
_WARM_UP = 3
_COMPUTE_SHARE = 2
"""Computing between two all-reduces that it hides, in times of an all-reduce."""
_TURNS = 16
"""Parts of a computation, with an all-reduce after each."""
_IN_FLIGHT = 3
"""All-reduces under way at once: those of the others, when four hTasks take turns."""
_ROW = 8
"""Collectives per timing. Now and then one takes ten times as long, when a rank or its messages wait for a
processor; a stage, which waits for hundreds, pays their mean, and a median of single ones would not show it.
"""
_TIMEOUT = timedelta(seconds=60)


class RankGroup:
    """All ranks that communicate in a session; every one of them makes the same calls in the same order.

    Args:
        device: Device of this rank.
        path: File that the ranks meet in; must not exist before.
        ranks: How many they are, at least two.
        sizes: Sizes of the groups whose collectives are measured: the first so many ranks.
    """

    def __init__(self, device: Device, path: Path, ranks: int, sizes: Sequence[int]) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._device = device
        self._rank = device.rank
        dist.init_process_group(
            device.backend, init_method=f"file://{path}", rank=self._rank, world_size=ranks, timeout=_TIMEOUT
        )
        # Groups are made in the same order on all ranks, those that a rank is not in included.
        forth = self._pair_group()
        self._directions = (forth, self._pair_group() if device.group_per_direction else forth)
        self._groups: dict[int, ProcessGroup] = {size: dist.new_group(list(range(size))) for size in sizes}
        if self._rank in _PAIR:
            self._connect()

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()

    def measure(self, op: Operator, model: ModelSpec, limit_s: float) -> Iterator[tuple[Operator, Sample]]:
        """Measure a collective, or a ``p2p`` with the ``message`` of the same bytes.

        Args:
            op: One of the link kinds but ``message``.
            model: Collectives are of tensors in its dtype.
            limit_s: Seconds for the repetitions.

        Yields:
            What was measured, on rank 0; nothing elsewhere. A ``p2p`` is half a round trip, until the
            receiver has the message; a ``message`` the processor time of rank 0 for one that it sends or
            receives. A collective is what it adds to a stage that computes before and after it: one call
            after the other, without anything in between, takes half as long.
        """
        if op.kind == "p2p":
            if self._rank not in _PAIR:
                return
            trip = self._round_trip(op.dims[0])
            group, share = self._directions[0], 2  # there and back
            measured = [op, Operator("message", op.dims)]
        else:
            bytes_, size = op.dims
            if self._rank >= size:
                return
            trip = self._collective(op.kind, bytes_, size, model)
            group, share = self._groups[size], 1
            measured = [op]
        times_s = self._repeat(trip, group, limit_s)
        if self._rank == 0:
            for column, each in zip(zip(*times_s, strict=True), measured, strict=False):
                yield each, summarize([seconds / share for seconds in column])

    def overlap(
        self, tokens: int, compute: Callable[[], object], model: ModelSpec, limit_s: float
    ) -> Overlap | None:
        """Measure what all-reduces of all ranks and a computation cost each other.

        A stage whose hTasks take turns has several all-reduces under way and waits for one only when they
        had time to end. So neither a rank that is late nor the latency of a message holds anybody up, and
        what is left is the processor or memory that all-reduces take from the computation. It is repeated
        until it takes twice as long as an all-reduce, as in a stage that computes more than it communicates;
        then ``both_s = compute_s + contention * communication_s``.

        Args:
            tokens: The all-reduces are of hidden states of as many.
            compute: A call on this rank's device.
            model: The backbone.
            limit_s: Seconds for the repetitions.

        Returns:
            Overlap of one turn, on rank 0; None elsewhere.
        """
        import torch

        dist, device = self._dist, self._device
        elements, dtype = tokens * model.hidden, getattr(torch, model.dtype)
        hidden = [torch.zeros(elements, dtype=dtype, device=device.name) for _ in range(_IN_FLIGHT + 1)]
        token = torch.zeros(1, device=device.name)

        def turn_s(row: Callable[[], None]) -> float:
            dist.all_reduce(token)  # meet
            return device.link_timer.call_s(row) / _TURNS

        def alone(calls: int) -> None:
            for _ in range(_TURNS * calls):
                compute()

        def with_sums(calls: int, in_flight: int) -> None:
            under_way: deque[Work] = deque()
            for turn in range(_TURNS):
                for _ in range(calls):
                    compute()
                under_way.append(dist.all_reduce(hidden[turn % len(hidden)], async_op=True))
                if len(under_way) > in_flight:
                    under_way.popleft().wait()
            for work in under_way:
                work.wait()

        first = partial(alone, 1), partial(with_sums, 1, 0)
        warm_s = [[turn_s(row) for row in first] for _ in range(2 * _WARM_UP)][_WARM_UP:]
        call_s, apart_s = (fmean(column) for column in zip(*warm_s, strict=True))
        communication_s = max(apart_s - call_s, SHORTEST_S)
        calls = max(1, math.ceil(_COMPUTE_SHARE * communication_s / max(call_s, 1e-9)))
        trial_s = _TURNS * (2 * communication_s + 3 * calls * call_s)
        repetitions = max(MIN_REPETITIONS, min(_MAX_REPETITIONS, int(limit_s / max(trial_s, 1e-9))))
        agreed = torch.tensor([calls, repetitions], device=device.name)
        dist.broadcast(agreed, 0)
        calls, repetitions = (int(each) for each in agreed)

        rows = (partial(alone, calls), partial(with_sums, calls, 0), partial(with_sums, calls, _IN_FLIGHT))
        times_s = [[turn_s(row) for row in rows] for _ in range(repetitions)]
        if self._rank != 0:
            return None
        compute_s, apart_s, both_s = (summarize(each).median_s for each in zip(*times_s, strict=True))
        return Overlap(
            tokens=tokens,
            calls=calls,
            compute_s=compute_s,
            communication_s=max(apart_s - compute_s, SHORTEST_S),
            both_s=both_s,
        )

    def _pair_group(self) -> ProcessGroup:
        group: ProcessGroup = self._dist.new_group(list(_PAIR))
        return group

    def _connect(self) -> None:
        """First message of each direction, one after the other: NCCL makes a connection at its first use."""
        import torch

        token = torch.ones(1, device=self._device.name)
        for source in _PAIR:
            self._send(token).wait() if self._rank == source else self._receive(token).wait()

    def _repeat(
        self, call: Callable[[], tuple[float, float]], group: ProcessGroup, limit_s: float
    ) -> list[tuple[float, float]]:
        """Results of as many calls as the limit allows by rank 0's clock, equally many on all ranks."""
        import torch

        warm_s = []
        for _ in range(_WARM_UP):
            start_s = time.perf_counter()
            call()
            warm_s.append(time.perf_counter() - start_s)
        affordable = int(limit_s / max(min(warm_s), 1e-9))
        repetitions = max(MIN_REPETITIONS, min(_MAX_REPETITIONS, affordable))
        count = torch.tensor([repetitions], device=self._device.name)
        self._dist.broadcast(count, 0, group=group)
        return [call() for _ in range(int(count))]

    def _round_trip(self, bytes_: int) -> Callable[[], tuple[float, float]]:
        """Elapsed, and processor time of this rank, in which it sends one message and receives one."""
        import torch

        device = self._device
        sent = torch.ones(bytes_, dtype=torch.uint8, device=device.name)
        received = torch.empty_like(sent)

        def trip() -> tuple[float, float]:
            computed_before_s = device.processor_s()
            posted = self._receive(received)
            leaving: list[Work] = []

            def exchange() -> None:
                if self._rank == 1:
                    posted.wait()
                leaving.append(self._send(sent))
                if self._rank == 0:
                    posted.wait()

            elapsed_s = device.link_timer.call_s(exchange)
            leaving[0].wait()
            return elapsed_s, device.processor_s() - computed_before_s

        return trip

    def _collective(
        self, kind: str, bytes_: int, size: int, model: ModelSpec
    ) -> Callable[[], tuple[float, float]]:
        import torch

        dtype: torch.dtype = getattr(torch, model.dtype)
        elements = max(1, bytes_ // (model.dtype_bytes * size))  # of one rank's part
        whole = torch.zeros(elements * size, dtype=dtype, device=self._device.name)  # sums stay finite
        part = torch.zeros_like(whole[:elements])
        dist, group = self._dist, self._groups[size]
        # The names before torch 2.13, which warns of them.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: all_gather(whole, part, group=group),
            "reduce_scatter": lambda: reduce_scatter(part, whole, group=group),
        }
        call = calls[kind]
        # A rank is the later, the longer it has computed; so about what a stage computes between two sums.
        tokens = max(1, elements * size // model.hidden)
        inputs = torch.zeros(tokens, model.hidden, dtype=dtype, device=self._device.name)
        up, down = inputs.new_zeros(model.hidden, model.ffn), inputs.new_zeros(model.ffn, model.hidden)

        def compute() -> None:
            for _ in range(_ROW):
                inputs @ up @ down

        def apart() -> None:
            for _ in range(_ROW):
                inputs @ up @ down
                call()

        timer = self._device.link_timer
        least_s = min(timer.call_s(call) for _ in range(2 * _ROW))  # computing before it makes none shorter

        def added() -> tuple[float, float]:
            compute_s, apart_s = timer.call_s(compute), timer.call_s(apart)
            return max((apart_s - compute_s) / _ROW, least_s), 0.0

        return added

    def _send(self, tensor: Tensor) -> Work:
        work = self._dist.isend(tensor, 1 - self._rank, group=self._directions[self._rank])
        assert work is not None  # None is for ranks outside the group
        return work

    def _receive(self, tensor: Tensor) -> Work:
        peer = 1 - self._rank
        work = self._dist.irecv(tensor, peer, group=self._directions[peer])
        assert work is not None  # None is for ranks outside the group
        return work


_PAIR = (0, 1)
"""Ranks that messages are measured between."""
