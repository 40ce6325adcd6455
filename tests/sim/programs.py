"""Random programs: hTasks with nodes on both streams, launched in any order that can run."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from muxtune.graph import TimedNode
from sim.program import Launch, Launches, Program

SECONDS = st.floats(0.0, 1.0).filter(lambda seconds: seconds == 0 or seconds > 1e-6)


@st.composite
def graphs(draw: st.DrawFn, *, largest: int = 8) -> tuple[TimedNode, ...]:
    """A graph that waits for some of what comes before each node."""
    nodes: list[TimedNode] = []
    for position in range(draw(st.integers(1, largest))):
        deps = draw(st.sets(st.integers(0, position - 1), max_size=3)) if position else set()
        stream = draw(st.sampled_from(["compute", "communication"]))
        nodes.append(TimedNode(f"n{position}", stream, draw(SECONDS), tuple(sorted(deps))))
    return tuple(nodes)


@st.composite
def launch_orders(draw: st.DrawFn, of: dict[int, Sequence[TimedNode]]) -> Launches:
    """All nodes in an order in which they could run one after the other, then parted by stream."""
    waiting = {(h, i): set(node.deps) for h, nodes in of.items() for i, node in enumerate(nodes)}
    order: list[Launch] = []
    while waiting:
        ready = sorted(launch for launch, deps in waiting.items() if not deps)
        chosen = draw(st.sampled_from(ready))
        order.append(chosen)
        del waiting[chosen]
        for (h, _), deps in waiting.items():
            if h == chosen[0]:
                deps.discard(chosen[1])
    return Launches(
        compute=tuple((h, i) for h, i in order if of[h][i].stream == "compute"),
        communication=tuple((h, i) for h, i in order if of[h][i].stream == "communication"),
    )


@st.composite
def programs(draw: st.DrawFn, *, htasks: Sequence[int] = (0, 1), largest: int = 8) -> Program:
    """A program of some hTasks."""
    of = {h: draw(graphs(largest=largest)) for h in htasks}
    return Program.launched(of, draw(launch_orders(of)))


def node(seconds: float, *deps: int, stream: str = "compute") -> TimedNode:
    """A node by its seconds."""
    return TimedNode("n", stream, seconds, deps)  # type: ignore[arg-type]
