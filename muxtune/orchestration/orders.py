"""Launch orders of a clock: what each stream runs one after the other, and what waits for what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from muxtune.orchestration.streams import Barrier
from muxtune.orchestration.subgraphs import COMMUNICATION, COMPUTE, Cut
from muxtune.orchestration.timed_subgraphs import ClockSubgraphs, LaunchGraph
from muxtune.support.errors import SpecError

Turn = tuple[int, int]
"""An hTask by its position in the clock, and which of its subgraphs on that stream."""

_RUN = re.compile(r"(\d{1,6}):(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """All that a stage has to know to play a clock, given the graphs of its hTasks."""

    barrier: Barrier
    compute: tuple[Turn, ...]
    communication: tuple[Turn, ...]


def encode_turns(turns: Iterable[Turn]) -> str:
    """Turns as a short text: ``0:0-2 1:0 0:3`` for three of hTask 0, the first of hTask 1, and so on."""
    runs: list[list[int]] = []
    for htask, number in turns:
        if runs and runs[-1][0] == htask and runs[-1][2] + 1 == number:
            runs[-1][2] = number
        else:
            runs.append([htask, number, number])
    return " ".join(
        f"{htask}:{first}" if first == last else f"{htask}:{first}-{last}" for htask, first, last in runs
    )


def decode_turns(text: str) -> tuple[Turn, ...]:
    """Turns from what :func:`encode_turns` wrote.

    Raises:
        SpecError: It is something else.
    """
    turns: list[Turn] = []
    for word in text.split():
        run = _RUN.fullmatch(word)
        if run is None:
            raise SpecError("launch order", word, "HTASK:NUMBER or HTASK:FIRST-LAST")
        first = int(run[2])
        turns += [(int(run[1]), number) for number in range(first, int(run[3] or first) + 1)]
    return tuple(turns)


def one_after_another(clock: ClockSubgraphs) -> list[int]:
    """Subgraphs of the first hTask as it runs best alone, then those of the next."""
    return list(chain.from_iterable(_alone(clock)))


def in_turns(clock: ClockSubgraphs) -> list[int]:
    """Each hTask as it runs best alone: the first subgraph of each, then the second of each."""
    rounds = zip_longest(*_alone(clock))
    return [item for item in chain.from_iterable(rounds) if item is not None]


def _alone(clock: ClockSubgraphs) -> list[list[int]]:
    firsts = zip(clock.graphs, clock.firsts, strict=True)
    return [[first + each for each in graph.alone] for graph, first in firsts]


def turns_of(clock: ClockSubgraphs, items: Iterable[int], barrier: Barrier) -> LaunchOrder:
    """The order of subgraphs, told by turns."""
    turn_of = {
        item: (position, number)
        for stream in (COMPUTE, COMMUNICATION)
        for position in range(len(clock.graphs))
        for number, item in enumerate(clock.on_stream(position, stream))
    }
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for item in items:
        turns[clock.streams[item]].append(turn_of[item])
    return LaunchOrder(barrier, tuple(turns[COMPUTE]), tuple(turns[COMMUNICATION]))


def items_of(clock: ClockSubgraphs, order: LaunchOrder) -> list[int]:
    """The subgraphs of turns, each after all that it waits for.

    Raises:
        SpecError: The turns are not those of these hTasks, or the streams would wait for each other for ever.
    """
    queues = [
        _stream_items(clock, order.compute, COMPUTE),
        _stream_items(clock, order.communication, COMMUNICATION),
    ]
    waiting = clock.waiting.copy()
    taken = [0, 0]
    items: list[int] = []
    while len(items) < len(clock):
        before = len(items)
        for stream, queue in enumerate(queues):
            while taken[stream] < len(queue) and not waiting[queue[taken[stream]]]:
                item = queue[taken[stream]]
                taken[stream] += 1
                items.append(item)
                for follower in clock.followers[item]:
                    waiting[follower] -= 1
        if len(items) == before:
            where = " and ".join(f"{name} turn {taken[i]}" for i, name in enumerate(_NAMES))
            raise SpecError("launch order", f"{where} wait for each other", "an order that can run")
    if order.barrier == "none":
        return items
    for queue, name in zip(queues, _NAMES, strict=True):
        owners = [clock.owners[item] for item in queue]
        if owners != sorted(owners):
            expected = f"one hTask after the other, with barrier {order.barrier}"
            raise SpecError(
                name,
                encode_turns(order.compute if name == _NAMES[COMPUTE] else order.communication),
                expected,
            )
    return sorted(items, key=clock.owners.__getitem__)


def check_order(cuts: Sequence[Cut], order: LaunchOrder) -> None:
    """Whether an order is one of these hTasks and can run, whatever their subgraphs take.

    Raises:
        SpecError: It is not.
    """
    items_of(ClockSubgraphs([LaunchGraph(cut, (0.0,) * len(cut.subgraphs), 0.0) for cut in cuts]), order)


_NAMES = ("compute", "communication")


def _stream_items(clock: ClockSubgraphs, turns: Sequence[Turn], stream: int) -> list[int]:
    """The subgraphs of a stream's turns."""
    own = [clock.on_stream(position, stream) for position in range(len(clock.graphs))]
    expected = [(position, number) for position, items in enumerate(own) for number in range(len(items))]
    if sorted(turns) != expected:
        counts = ", ".join(f"{len(items)} of hTask {position}" for position, items in enumerate(own))
        raise SpecError(_NAMES[stream], encode_turns(turns), f"every subgraph once: {counts}")
    return [own[position][number] for position, number in turns]
