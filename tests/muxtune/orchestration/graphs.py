"""Random operator graphs, and a slow player of operators that shares no code with the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from hypothesis import strategies as st

from muxtune.graph import StageGraph, Stream, TimedNode

Turns = Mapping[Stream, Sequence[tuple[int, int]]]
"""Each stream's operators in their order: hTask, and position in its graph."""

SECONDS = st.integers(0, 12).map(float)


@st.composite
def parts(draw, *, largest=6, streams=("compute", "compute", "communication")):
    """Nodes that wait for some of what comes before each; some of those that nobody reads are leaves."""
    nodes: list[TimedNode] = []
    for position in range(draw(st.integers(1, largest))):
        stream = draw(st.sampled_from(streams))
        role = "communication" if stream == "communication" else draw(st.sampled_from(["base", "adapter"]))
        deps = draw(st.sets(st.integers(0, position - 1), max_size=2)) if position else set()
        nodes.append(TimedNode("n", stream, draw(SECONDS), tuple(sorted(deps)), role))
    read = {dep for node in nodes for dep in node.deps}
    return tuple(
        TimedNode(
            node.label, node.stream, node.seconds, node.deps, node.role, i not in read and draw(st.booleans())
        )
        for i, node in enumerate(nodes)
    )


@st.composite
def stage_graphs(draw, *, largest=6, most_parts=2, most_repeats=3, **kwargs):
    part = st.tuples(parts(largest=largest, **kwargs), st.integers(1, most_repeats))
    return StageGraph(tuple(draw(st.lists(part, min_size=1, max_size=most_parts))))


def clocks(*, most=3, **kwargs):
    return st.lists(stage_graphs(**kwargs), min_size=1, max_size=most)


def chain(*seconds: float, first: Stream = "compute") -> StageGraph[TimedNode]:
    """Computing and communicating in turn."""
    streams: tuple[Stream, Stream] = ("compute", "communication")
    start = streams.index(first)
    return StageGraph(
        (
            (
                tuple(
                    TimedNode(f"n{i}", streams[(start + i) % 2], each, (i - 1,) if i else ())
                    for i, each in enumerate(seconds)
                ),
                1,
            ),
        )
    )


def play_slowly(
    graphs: Sequence[Sequence[TimedNode]], turns: Turns, contention: float = 0.0
) -> dict[tuple[int, int], tuple[float, float]]:
    """Start and end of every operator, from event to event, in exact numbers.

    Each stream takes its operators one by one; the next one starts when its inputs are there. While both run,
    both go on at rate ``1 / (1 + contention)``.
    """
    rate = 1 / (1 + Fraction(contention))
    now = Fraction(0)
    queues = {stream: list(each) for stream, each in turns.items()}
    left: dict[Stream, Fraction] = {}
    starts: dict[tuple[int, int], Fraction] = {}
    ends: dict[tuple[int, int], Fraction] = {}
    while any(queues.values()):
        for stream, queue in queues.items():
            if queue and stream not in left:
                htask, position = queue[0]
                node = graphs[htask][position]
                if all((htask, dep) in ends for dep in node.deps):
                    left[stream] = Fraction(node.seconds)
                    starts[queue[0]] = now
        assert left, f"nothing can run after {ends}"
        pace = rate if len(left) == 2 else Fraction(1)
        step = min(left.values())
        now += step / pace
        for stream in list(left):
            left[stream] -= step
            if not left[stream]:
                del left[stream]
                ends[queues[stream].pop(0)] = now
    return {turn: (float(starts[turn]), float(ends[turn])) for turn in ends}


def run_orders(graphs: Sequence[Sequence[TimedNode]]) -> Iterator[list[tuple[int, int]]]:
    """All orders in which the operators of some graphs could run one after the other."""

    def follow(done: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        if len(done) == sum(map(len, graphs)):
            yield list(done)
        for htask, nodes in enumerate(graphs):
            for position, node in enumerate(nodes):
                if (htask, position) not in done and all((htask, dep) in done for dep in node.deps):
                    yield from follow([*done, (htask, position)])

    return follow([])
