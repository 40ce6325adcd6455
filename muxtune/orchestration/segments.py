"""What a launcher on one host thread needs of a clock's launch order.

A host thread cannot launch subgraph by subgraph: between two collectives of an hTask it runs the code that
there is. So an action is a row of *main segments*: number i is all of the hTask's work on the compute stream
from having waited for collective i - 1 to launching collective i, the last one to the end of the action. What
holds nobody up (leaves of the graph, in a backward the gradients of the adapters' factors) arises in a main
segment and may run at any time after it: *side segment* i is that of main segment i.

**Collectives** are counted as the graph has them, in the order in which the action launches them. Of one rank
of a stage with ``L`` layers, at ``tp`` > 1:

    forward   embedding (first stage), after attention and after the MLP of each layer, loss (last stage)
    backward  head (last stage), before the MLP and before the attention of each layer, last layer first

The loss is one, though a runtime may sum and maximize in two calls. In the first layer of all, backward stops
at the first block with an adapter, and a block's collective is only there if something before the block, or
an adapter of an earlier block, needs the gradient: none before the attention, and with adapters on the MLP's
output alone none before the MLP either. Gradients that are summed at a STEP belong to no action.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from muxtune.graph.operators import Phase
from muxtune.orchestration.orders import LaunchOrder, Turn
from muxtune.orchestration.subgraphs import COMMUNICATION, COMPUTE, Cut


@dataclass(frozen=True, slots=True)
class LaunchSegment:
    """Work of an hTask between two of its collectives."""

    htask: int
    """Position in the plan."""
    number: int
    """Collectives of the action that were waited for before it; of a side segment, of where it arises."""
    side: bool
    """Whether nobody waits for it."""


class LaunchPlan(Protocol):
    """What is read of a plan; :class:`muxtune.plan.Plan` has it."""

    def action_cut(self, stage: int, phase: Phase, htask: int) -> Cut:
        """Subgraphs of an hTask's action on a stage."""
        ...

    def remaining_order(self, stage: int, phase: Phase, htasks: tuple[int, ...]) -> LaunchOrder | None:
        """Launch order of a clock of these hTasks; None if the plan has none."""
        ...


def collectives(plan: LaunchPlan, stage: int, phase: Phase, htask: int) -> int:
    """Number of collectives of an hTask's action on a stage; its main segments are one more."""
    return _collectives(plan.action_cut(stage, phase, htask))


def clock_segments(
    plan: LaunchPlan, stage: int, phase: Phase, htasks: tuple[int, ...]
) -> tuple[LaunchSegment, ...] | None:
    """Segments of a clock in the order in which a rank of the stage should run them.

    A segment stands where the last of its subgraphs stands in the plan's compute order, so main segments of
    an hTask ascend, and a side segment comes after the main one that it arises in. Every main segment is
    there, also an empty last one (after the loss of a forward): it only waits for the last collective, so it
    comes as late as the barrier lets it. Side segments are there if they have work.

    The order is a preference: any in which the main segments of each hTask ascend gives the same results, as
    long as all ranks of a stage choose the same one. It takes milliseconds; ask once per kind of clock.

    Args:
        plan: Plan that has been checked.
        stage: Stage of the pipeline.
        phase: ``fwd`` of a clock of F, ``bwd`` of B.
        htasks: hTasks of the clock, in its order. Where the plan shows no such clock (some hTasks of its
            bucket have finished), the order is what is left of a larger one.

    Returns:
        None if nothing is to overlap: the plan has no launch order, or one that runs one launch at a time.
    """
    order = plan.remaining_order(stage, phase, htasks)
    if order is None or order.barrier == "launch":
        return None
    placed: list[tuple[tuple[int, int], int, int, bool]] = []
    for position, htask in enumerate(htasks):
        cut = plan.action_cut(stage, phase, htask)
        places = _places(cut, order, position)
        late = _late(order, position)
        behind = (-1, 0)
        for number in range(_collectives(cut) + 1):
            main = (places[number, False], 0) if (number, False) in places else late
            behind = max(behind, main)
            placed.append((behind, htask, number, False))
            if (number, True) in places:
                placed.append((max((places[number, True], 0), behind), htask, number, True))
    # At one place stand segments of one hTask, or those that come late, of which none stand at one.
    return tuple(
        LaunchSegment(htask, number, side) for _, htask, number, side in sorted(placed, key=_by_place)
    )


def _by_place(each: tuple[tuple[int, int], int, int, bool]) -> tuple[tuple[int, int], int, bool]:
    place, _, number, side = each
    return place, number, side


def _late(order: LaunchOrder, position: int) -> tuple[int, int]:
    """Place behind all computing, with a barrier behind the hTask's own; in the order of collectives."""
    last = max((i for i, turn in enumerate(order.communication) if turn[0] == position), default=0)
    if order.barrier == "htask":
        return max((i for i, turn in enumerate(order.compute) if turn[0] == position), default=0), 1
    return len(order.compute), last


def _places(cut: Cut, order: LaunchOrder, position: int) -> dict[tuple[int, bool], int]:
    """Where each segment (number, side) with work stands, of the hTask at a position in the clock."""
    own = [subgraph for subgraph, stream in zip(cut.subgraphs, cut.streams, strict=True) if stream == COMPUTE]
    waited = _waited(cut)
    places: dict[tuple[int, bool], int] = {}
    for place, (owner, number) in enumerate(order.compute):
        if owner == position:
            for node in own[number].nodes:
                places[waited[node], cut.leaves[node]] = place
    return places


def _waited(cut: Cut) -> list[int]:
    """Number of collectives that come before each node; those of an action follow one another."""
    on_link = [False] * len(cut.deps)
    for subgraph, stream in zip(cut.subgraphs, cut.streams, strict=True):
        for node in subgraph.nodes:
            on_link[node] = stream == COMMUNICATION
    waited: list[int] = []
    for deps in cut.deps:
        waited.append(max((waited[dep] + on_link[dep] for dep in deps), default=0))
    return waited


def _collectives(cut: Cut) -> int:
    return sum(stream == COMMUNICATION for stream in cut.streams)


def left_of(order: LaunchOrder, members: Sequence[int], wanted: Sequence[int]) -> LaunchOrder:
    """What is left of an order when hTasks leave its clock.

    Nothing in an order waits for another hTask, so the rest of it can still run.

    Args:
        order: Launch order of a clock.
        members: hTasks of that clock.
        wanted: hTasks that stay, in the same order.
    """
    position_of = {members.index(htask): position for position, htask in enumerate(wanted)}

    def left(turns: Sequence[Turn]) -> Iterator[Turn]:
        return ((position_of[at], number) for at, number in turns if at in position_of)

    return LaunchOrder(order.barrier, tuple(left(order.compute)), tuple(left(order.communication)))
