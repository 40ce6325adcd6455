"""The program that a clock's orchestration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muxtune.graph import Stream, TimedNode
from muxtune.orchestration import ClockSchedule, Cut
from sim.program import Launch, Launches, Program


def orchestrated_program(
    schedule: ClockSchedule,
    cuts: Sequence[Cut],
    nodes: Sequence[Sequence[TimedNode]],
    htasks: Sequence[int],
) -> Program:
    """Node by node what a schedule has subgraph by subgraph.

    The nodes of a subgraph run one after the other; each waits for its own inputs, which are no fewer on the
    other stream than those of the subgraph.

    Args:
        schedule: Schedule of a clock.
        cuts: Subgraphs of each of its hTasks.
        nodes: Timed nodes of each of its hTasks.
        htasks: Positions of its hTasks in the plan.

    Returns:
        A program that takes ``schedule.seconds``.
    """
    graphs = dict(zip(htasks, nodes, strict=True))
    if schedule.barrier == "launch":  # one launch at a time: in any order that can run
        return Program.in_turn(graphs.items())

    def launched(stream: Stream, members: Sequence[int]) -> Iterator[Launch]:
        for launch in schedule.launches[stream]:
            if launch.htask in members:
                for node in cuts[launch.htask].subgraphs[launch.subgraph].nodes:
                    yield htasks[launch.htask], node

    def program(members: Sequence[int]) -> Program:
        launches = Launches(
            compute=tuple(launched("compute", members)),
            communication=tuple(launched("communication", members)),
        )
        return Program.launched({htasks[member]: nodes[member] for member in members}, launches)

    positions = range(len(htasks))
    if schedule.barrier == "none":
        return program(positions)
    whole = program(positions[:1])
    for position in positions[1:]:
        whole = whole.then(program((position,)))
    return whole
