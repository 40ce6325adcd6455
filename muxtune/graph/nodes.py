"""Operators with what they wait for: the graph of one action of a stage.

A graph is a tuple of nodes in an order in which they can run; a node names earlier nodes as its inputs. The
nodes of a stage's many equal layers are written once, see :class:`StageGraph`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, Self, TypeVar

from muxtune.operators import COLLECTIVE_KINDS, Operator

Stream = Literal["compute", "communication"]

Role = Literal["base", "adapter", "communication", "host"]
"""What a node is in the unified representation (paper section 3.2).

base           an operator of the frozen backbone; runs once for all tasks of an hTask
adapter        what one task adds at one base operator: dispatch, adapter and aggregate
communication  a collective among the ranks of a stage
host           the processor's own work for an action: tensors of a micro-batch, messages
"""


class Waiting(Protocol):
    """Anything that waits for earlier nodes."""

    @property
    def deps(self) -> tuple[int, ...]:
        """Positions of the nodes whose results it reads; all are earlier."""
        ...

    @property
    def leaf(self) -> bool:
        """Whether only the optimizer step reads its result, so that nothing of the action waits for it."""
        ...

    def after(self, deps: tuple[int, ...]) -> Self:
        """This node with other inputs."""
        ...


@dataclass(frozen=True, slots=True)
class Node:
    """An operator in a graph."""

    op: Operator
    role: Role
    deps: tuple[int, ...] = ()
    count: float = 1.0
    """How often it runs, one after the other; averages over micro-batches and parts of an operator have
    fractions."""
    task: int | None = None
    """Task of the hTask that an adapter belongs to; None if it shares a launch with those of other tasks."""
    group: tuple[Operator, ...] = ()
    """Adapters of several tasks in one launch, all of them; ``op`` is the first."""
    leaf: bool = False
    """Only the optimizer step reads its result; nothing of the action waits for it."""

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All that it runs."""
        return self.group or (self.op,)

    @property
    def stream(self) -> Stream:
        """Stream that it runs on."""
        return "communication" if self.op.kind in COLLECTIVE_KINDS else "compute"

    def after(self, deps: tuple[int, ...]) -> Node:
        """This node with other inputs."""
        return replace(self, deps=deps)


@dataclass(frozen=True, slots=True)
class TimedNode:
    """A node with its time alone on the device; what orchestration and simulator work on."""

    label: str
    """Name for people: the operator's kind, and of an adapter its task."""
    stream: Stream
    seconds: float
    deps: tuple[int, ...] = ()
    role: Role = "base"
    leaf: bool = False
    """Nothing of the action waits for it; the action ends when it has ended all the same."""

    def after(self, deps: tuple[int, ...]) -> TimedNode:
        """This node with other inputs."""
        return replace(self, deps=deps)


N = TypeVar("N", bound=Waiting)


@dataclass(frozen=True, slots=True)
class StageGraph(Generic[N]):
    """One action of a stage: what comes before the layers, the layers, and what comes after them.

    Layers that are alike are written once. Positions in ``deps`` count inside a part; a node without any
    reads what the part before it gave.
    """

    parts: tuple[tuple[tuple[N, ...], int], ...]
    """Graphs in the order of execution, and how often each runs in a row."""
    tp: int = 1
    """Ranks that share the stage; operators are those of one of them."""

    def expand(self) -> tuple[N, ...]:
        """The whole graph; what begins a part waits for what nobody reads in the part before.

        Leaves are waited for by nobody.
        """
        nodes: list[N] = []
        ends: tuple[int, ...] = ()
        for graph, repeats in self.parts:
            if not graph:
                continue
            read = {dep for node in graph for dep in node.deps}
            last = [position for position, node in enumerate(graph) if position not in read and not node.leaf]
            for _ in range(repeats):
                offset = len(nodes)
                nodes += [node.after(tuple(offset + dep for dep in node.deps) or ends) for node in graph]
                ends = tuple(offset + position for position in last)
        return tuple(nodes)

    def __iter__(self) -> Iterator[tuple[N, int]]:
        """Every node and how many layers have it."""
        for graph, repeats in self.parts:
            for node in graph:
                yield node, repeats
