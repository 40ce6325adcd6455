"""What the two streams of a stage run in one clock: kernels in launch order, and what each waits for.

Kernels of a stream run in the order of their launch, so one that is launched waits for everything before it
on its own stream. Of the other stream it then has to know a single number: how many kernels must have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from muxtune.graph import Stream, TimedNode

Launch = tuple[int, int]
"""hTask, and position of the node in its graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """A clock's nodes as they are launched on each stream."""

    compute: tuple[Launch, ...]
    communication: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A node in a launch order."""

    htask: int
    node: TimedNode
    needs: int
    """Kernels of the other stream that must have ended before this one starts."""


@dataclass(frozen=True, slots=True)
class Program:
    """Kernels of one clock on one stage.

    Raises:
        RuntimeError: They wait for each other in a circle.
    """

    compute: tuple[Kernel, ...]
    communication: tuple[Kernel, ...]
    compute_s: tuple[float, ...] = field(init=False)
    communication_s: tuple[float, ...] = field(init=False)
    compute_needs: tuple[int, ...] = field(init=False)
    communication_needs: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Columns, because the engine reads them once per kernel.
        for name, kernels in (("compute", self.compute), ("communication", self.communication)):
            object.__setattr__(self, f"{name}_s", tuple(kernel.node.seconds for kernel in kernels))
            object.__setattr__(self, f"{name}_needs", tuple(kernel.needs for kernel in kernels))
        _check_ends(self)

    def __len__(self) -> int:
        """Kernels of both streams."""
        return len(self.compute) + len(self.communication)

    @property
    def work_s(self) -> float:
        """Seconds of all kernels, one after the other."""
        return sum(self.compute_s) + sum(self.communication_s)

    @classmethod
    def in_turn(cls, graphs: Iterable[tuple[int, Sequence[TimedNode]]]) -> Self:
        """One kernel after the other, whichever stream it is on; nothing overlaps.

        Args:
            graphs: Graph of each hTask, in the order of execution.
        """
        kernels: dict[Stream, list[Kernel]] = {"compute": [], "communication": []}
        for htask, nodes in graphs:
            for node in nodes:
                before = kernels["communication" if node.stream == "compute" else "compute"]
                kernels[node.stream].append(Kernel(htask, node, len(before)))
        return cls(tuple(kernels["compute"]), tuple(kernels["communication"]))

    @classmethod
    def launched(cls, graphs: Mapping[int, Sequence[TimedNode]], order: Launches) -> Self:
        """Kernels in an order of launch; each starts when its inputs are there and its stream is free.

        Args:
            graphs: Graph of each hTask.
            order: Every node of theirs once, on its own stream.

        Raises:
            RuntimeError: The order launches something else, or deadlocks.
        """
        streams: dict[Stream, tuple[Launch, ...]] = {
            "compute": order.compute,
            "communication": order.communication,
        }
        places = {
            launch: (stream, place)
            for stream, launches in streams.items()
            for place, launch in enumerate(launches)
        }
        wanted = {
            (htask, position): node.stream
            for htask, nodes in graphs.items()
            for position, node in enumerate(nodes)
        }
        launched = len(order.compute) + len(order.communication)
        if {launch: stream for launch, (stream, _) in places.items()} != wanted or launched != len(wanted):
            raise RuntimeError("the launch order is not one of these graphs: every node once, on its stream")
        kernels: dict[Stream, tuple[Kernel, ...]] = {}
        for stream, launches in streams.items():
            own = []
            for place, (htask, position) in enumerate(launches):
                node = graphs[htask][position]
                needs = 0
                for dep in node.deps:
                    other, other_place = places[htask, dep]
                    if other != stream:
                        needs = max(needs, other_place + 1)
                    elif other_place > place:
                        raise RuntimeError(f"{node.label} is launched before what it reads")
                own.append(Kernel(htask, node, needs))
            kernels[stream] = tuple(own)
        return cls(kernels["compute"], kernels["communication"])

    def then(self, other: Program) -> Program:
        """Another program after the end of this one."""

        def moved(kernels: tuple[Kernel, ...], before: int) -> tuple[Kernel, ...]:
            return tuple(Kernel(k.htask, k.node, before + k.needs) for k in kernels)

        return Program(
            self.compute + moved(other.compute, len(self.communication)),
            self.communication + moved(other.communication, len(self.compute)),
        )


def _check_ends(program: Program) -> None:
    """Dry run: both streams come to their end."""
    computed = communicated = -1
    ended = (0, 0)
    while ended != (computed, communicated):
        computed, communicated = ended
        ended = (
            _ended(program.compute_needs, computed, communicated),
            _ended(program.communication_needs, communicated, computed),
        )
    if ended != (len(program.compute), len(program.communication)):
        raise RuntimeError("the launch order deadlocks")


def _ended(needs: Sequence[int], start: int, others: int) -> int:
    """How far a stream gets by itself."""
    while start < len(needs) and needs[start] <= others:
        start += 1
    return start
