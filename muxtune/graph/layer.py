"""Forward and backward graph of one layer, with the adapters of all tasks and tensor-parallel collectives.

A layer is four blocks: norm and attention's inputs; attention and its output; norm and the MLP's inputs;
activation and the MLP's output. Linears that read the same input (queries, keys and values; gate and up) run
as one product. Where adapters stand depends on what their methods say (:mod:`muxtune.peft`): beside a linear,
reading what it reads, so that whoever reads the linear waits for both; before it, if they rewrite what it
reads; behind it, or behind its block, if they read what comes out; or beside a whole block. What a method
dispatches by an operator of its own, such as dropout, stands before its adapter.

**Tensor parallelism** (arXiv 1909.08053). The first and third block's linears are split by their outputs: the
forward has their input whole, the backward sums the input's gradient over the ranks. The second and fourth
block's are split by their inputs: the forward sums their outputs, the backward has the gradient whole. What
is added beside a linear is a part of the same sum; what reads an output comes after the sum. So adapters need
no collectives of their own.

**Backward** is the forward turned around: who was read waits for its readers. Under tensor parallelism an
adapter's half that gives the gradients of its tensors stands alone: it has no reader, and can run while
others communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.nodes import Node, Role
from muxtune.model import LAYER_INPUTS, ModelSpec
from muxtune.operators import Operator, Phase, operator
from muxtune.peft import Attachment, Specs, Step, attachments, depth_of, layer_sites, needs_backward

Launching = Literal["grouped", "separate"]
"""Adapters of several tasks at one base op: one node, or one node for each."""

_FIRST_KINDS = ("norm", "attention", "norm", "activation")
"""What each block does before its linears."""


class Launch(NamedTuple):
    """What a node runs."""

    op: Operator
    times: float = 1.0
    """How often, as :attr:`muxtune.graph.nodes.Node.count`."""
    task: int | None = None
    group: tuple[Operator, ...] = ()


class _Place(NamedTuple):
    """Where adapters stand in a layer; those at one place can share a launch. In the order of execution."""

    depth: int
    position: int
    """Position of the site in the layer."""
    reads_input: bool


_Attached = Mapping[_Place, Sequence[tuple[int, Attachment]]]
"""By place, tasks and what they attach there."""

_DISPATCH, _ADAPTER = "dispatch", "adapter"
"""Kinds of the slots of adapters, whose operators depend on the method."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A node before its micro-batch is known."""

    kind: str
    depth: int
    deps: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    """Widths of a linear; bytes per token and ranks of a collective."""
    phase: Phase | None = None
    """Phase in which a collective runs; None for what runs in both."""
    place: _Place | None = None
    """Where an adapter stands."""
    share: float = 1.0
    """Share of the operator that this node is."""
    leaf: bool = False
    along: bool = False
    """Whether it goes on with what the same tasks had in its only input."""


@lru_cache(maxsize=256)
def frozen_products(model: ModelSpec) -> tuple[tuple[int, int], ...]:
    """(in_features, out_features) of the frozen product of each block of a layer."""
    products: dict[int, tuple[int, int]] = {}
    for linear in model.linears:
        _, out_features = products.get(linear.block, (0, 0))
        products[linear.block] = (linear.in_features, out_features + linear.out_features)
    return tuple(products[block] for block in sorted(products))


def layer_graph(
    model: ModelSpec,
    work: MicrobatchWork,
    phase: Phase,
    *,
    tp: int = 1,
    layer: int = 0,
    trained: int | None = None,
    adapters: Launching = "grouped",
) -> tuple[Node, ...]:
    """Nodes of one layer for one micro-batch, as one of ``tp`` ranks runs them.

    Args:
        model: The backbone, whole.
        work: The micro-batch.
        phase: Forward or backward.
        tp: Tensor-parallel ranks.
        layer: Number of the layer, on which depends what is attached to it.
        trained: Depth of the first trained thing of all where it lies in this layer: nothing before it is
            trained, so the gradient stops there. None if something before the layer is.
        adapters: How those of several tasks at one base op are launched.

    Raises:
        SpecError: The backbone cannot be split into so many parts.
    """
    shard = model.shard(tp)
    adapted, *places = _adapted(shard, work.pefts, layer)
    return _filled(_slots(shard, *places, phase, tp, trained), work, adapted, adapters)


def stream_launches(
    model: ModelSpec, tokens: int, phase: Phase, *, tp: int = 1, trained: int | None = None
) -> list[Launch]:
    """What nodes of :func:`layer_graph` run that depend on the length of the stream alone.

    With :func:`own_launches` they are all nodes of the layer, for those who need nothing else of them.
    """
    shard = model.shard(tp)
    work = MicrobatchWork(tokens=tokens, task_tokens=(), pefts=(), attention=(), targets=0.0)
    return [
        launch
        for slot in _slots(shard, (), (), phase, tp, trained)
        for launch in _launches(slot, work, (), "grouped")
    ]


def own_launches(
    model: ModelSpec,
    work: MicrobatchWork,
    phase: Phase,
    *,
    tp: int = 1,
    layer: int = 0,
    trained: int | None = None,
    adapters: Launching = "grouped",
) -> Iterator[Launch]:
    """What nodes of :func:`layer_graph` run that depend on sequences and tasks: attention and adapters."""
    for slot, attached in _own_slots(model.shard(tp), work.pefts, layer, phase, tp, trained):
        yield from _launches(slot, work, attached, adapters)


@lru_cache(maxsize=4096)
def _own_slots(
    shard: ModelSpec, pefts: Specs, layer: int, phase: Phase, tp: int, trained: int | None
) -> tuple[tuple[_Slot, Sequence[tuple[int, Attachment]]], ...]:
    adapted, *places = _adapted(shard, pefts, layer)
    return tuple(
        (slot, adapted[slot.place] if slot.place is not None else ())
        for slot in _slots(shard, *places, phase, tp, trained)
        if slot.place is not None or slot.kind == "attention"
    )


@lru_cache(maxsize=4096)  # a search asks for the same tasks with other tokens again and again
def _adapted(
    model: ModelSpec, pefts: Specs, layer: int
) -> tuple[_Attached, tuple[_Place, ...], tuple[_Place, ...]]:
    """What tasks attach to a layer; the places, and those where something is dispatched."""
    adapted: dict[_Place, list[tuple[int, Attachment]]] = {}
    dispatching: set[_Place] = set()
    for task, peft in enumerate(pefts):
        for each in attachments(peft, model, layer):
            place = _Place(each.depth, each.site.position, each.reads == "input")
            adapted.setdefault(place, []).append((task, each))
            if each.dispatch is not None:
                dispatching.add(place)
    return adapted, tuple(sorted(adapted)), tuple(sorted(dispatching))


@lru_cache(maxsize=4096)  # the hTasks of a search differ in sizes, rarely in what is adapted
def _slots(
    model: ModelSpec,
    places: tuple[_Place, ...],
    dispatching: tuple[_Place, ...],
    phase: Phase,
    tp: int,
    trained: int | None,
) -> tuple[_Slot, ...]:
    """Nodes of a layer that has adapters at these places, some with a dispatch."""
    slots = _forward(model, places, dispatching, tp)
    if phase == "bwd":
        slots = _turned_around(slots)
    slots = _keep(slots, lambda slot: slot.phase in {None, phase})
    if phase == "fwd":
        return slots
    first = -1 if trained is None else trained
    slots = _keep(
        slots,
        lambda slot: needs_backward(slot.depth, first) or (slot.depth == first and slot.place is not None),
    )
    return _halved(slots, first) if tp > 1 else slots


def _forward(
    model: ModelSpec, places: Sequence[_Place], dispatching: Sequence[_Place], tp: int
) -> tuple[_Slot, ...]:
    """Forward with the collectives of both phases at the points where they belong."""
    sums = (model.hidden * model.dtype_bytes, tp)
    sites = layer_sites(model)
    slots: list[_Slot] = []
    ends: tuple[int, ...] = ()
    inputs: dict[str, tuple[int, ...]] = {}
    """What the linears of a block read, before the copy to the ranks."""

    def put(slot: _Slot) -> tuple[int, ...]:
        slots.append(slot)
        return (len(slots) - 1,)

    def put_adapters(block: int, step: Step, read: tuple[int, ...], ends: tuple[int, ...]) -> tuple[int, ...]:
        """Adapters of a step; those that read the input stand side by side, others one after the other."""
        beside = ends
        for place in places:
            if place.depth != depth_of(block, step):
                continue
            source = beside
            if place.reads_input:
                site = sites[place.position]
                source = inputs[site.reads] if site.kind == "block" and site.reads is not None else read
            if sites[place.position].kind == "keys_values":
                source = ()
            if place in dispatching:
                source += put(_Slot(_DISPATCH, place.depth, source, place=place))
            own = put(_Slot(_ADAPTER, place.depth, source, place=place))
            beside = beside + own if place.reads_input or not source else own
        return beside

    for block, shape in enumerate(frozen_products(model)):
        split_by_outputs = block % 2 == 0
        ends = put(_Slot(_FIRST_KINDS[block], depth_of(block, Step.BEGIN), ends))
        inputs[LAYER_INPUTS[block]] = ends
        if tp > 1 and split_by_outputs:
            ends = put(_Slot("all_reduce", depth_of(block, Step.COPY), ends, sums, phase="bwd"))
        read = put_adapters(block, Step.REWRITE, ends, ())
        read = (*ends, *read) if read else ends
        ends = put(_Slot("linear", depth_of(block, Step.LINEAR), read, shape))
        ends = put_adapters(block, Step.LINEAR, read, ends)
        if tp > 1 and not split_by_outputs:
            ends = put(_Slot("all_reduce", depth_of(block, Step.LINEAR), ends, sums, phase="fwd"))
        ends = put_adapters(block, Step.OUTPUT, read, ends)
        ends = put_adapters(block, Step.BLOCK, read, ends)
    return tuple(slots)


def _turned_around(slots: Sequence[_Slot]) -> tuple[_Slot, ...]:
    """Nodes from the last to the first; each that was read now waits for its readers."""
    readers: list[list[int]] = [[] for _ in slots]
    last = len(slots) - 1
    for position, slot in enumerate(slots):
        for dep in slot.deps:
            readers[dep].append(last - position)
    backwards = zip(reversed(slots), reversed(readers), strict=True)
    return tuple(replace(slot, deps=tuple(sorted(waited))) for slot, waited in backwards)


def _keep(slots: Iterable[_Slot], wanted: Callable[[_Slot], bool]) -> tuple[_Slot, ...]:
    """Nodes that are wanted; those that read another one read what it read."""
    kept: list[_Slot] = []
    stands_for: list[tuple[int, ...]] = []
    for slot in slots:
        deps = tuple(dict.fromkeys(place for dep in slot.deps for place in stands_for[dep]))
        stands_for.append((len(kept),) if wanted(slot) else deps)
        if wanted(slot):
            kept.append(replace(slot, deps=deps))
    return tuple(kept)


def _halved(slots: Iterable[_Slot], first: int) -> tuple[_Slot, ...]:
    """Backward of adapters as two halves: the input's gradient, and those of the trained tensors.

    Both take about the same floating-point operations. At depth ``first`` nobody needs the input's. A
    dispatch goes on with the input's.
    """
    slots = list(slots)
    dispatched = {slot.place for slot in slots if slot.kind == _DISPATCH}
    halves: list[_Slot] = []
    stands_for: list[int] = []
    for slot in slots:
        moved = replace(slot, deps=tuple(stands_for[dep] for dep in slot.deps))
        stands_for.append(len(halves))
        if slot.kind == _DISPATCH or slot.place is None:
            halves.append(replace(moved, leaf=slot.kind == _DISPATCH and slot.depth == first))
            continue
        if slot.depth == first:
            halves.append(replace(moved, leaf=slot.place not in dispatched))
            continue
        halves.append(replace(moved, share=0.5))
        halves.append(replace(slot, deps=(len(halves) - 1,), share=0.5, leaf=True, along=True))
    return tuple(halves)


def _filled(
    slots: Iterable[_Slot], work: MicrobatchWork, adapted: _Attached, adapters: Launching
) -> tuple[Node, ...]:
    """Nodes of the slots; one may take several. A half that goes on with another does so node by node."""
    nodes: list[Node] = []
    places: list[tuple[int, ...]] = []
    for slot in slots:
        deps = tuple([place for dep in slot.deps for place in places[dep]])
        start = len(nodes)
        role: Role = "communication" if slot.kind == "all_reduce" else "base"
        attached: Sequence[tuple[int, Attachment]] = ()
        if slot.place is not None:
            role, attached = "adapter", adapted[slot.place]
        for i, (op, count, task, group) in enumerate(_launches(slot, work, attached, adapters)):
            nodes.append(Node(op, role, (deps[i],) if slot.along else deps, count, task, group, slot.leaf))
        places.append(tuple(range(start, len(nodes))))
    return tuple(nodes)


def _launches(
    slot: _Slot, work: MicrobatchWork, attached: Sequence[tuple[int, Attachment]], adapters: Launching
) -> list[Launch]:
    """What a slot runs."""
    if slot.kind == _DISPATCH:
        return [
            Launch(each.dispatch.at(work.task_tokens[task]), task=task)
            for task, each in attached
            if each.dispatch is not None
        ]
    if slot.place is not None:
        return _adapter_launches(slot.share, work, attached, adapters)
    if slot.kind == "attention":
        return [
            *(
                Launch(operator("attention", sequences, length), calls)
                for calls, sequences, length in work.attention
            ),
            *(
                Launch(operator("carried_attention", *shape), calls)
                for calls, *shape in work.carried_attention
            ),
        ]
    if slot.kind == "all_reduce":
        per_token, ranks = slot.shape
        return [Launch(operator("all_reduce", per_token * work.tokens, ranks))]
    return [Launch(operator(slot.kind, *slot.shape, work.tokens))]


def _adapter_launches(
    share: float,
    work: MicrobatchWork,
    attached: Sequence[tuple[int, Attachment]],
    adapters: Launching,
) -> list[Launch]:
    """Adapters that share a launch, in the order of their first task; then those that run alone."""
    shared: dict[str, list[Operator]] = {}
    if adapters == "grouped":
        for task, each in attached:
            if each.launch is not None and each.dispatch is None:
                shared.setdefault(each.launch, []).append(each.adapter.at(work.task_tokens[task]))
    launches = [Launch(group[0], share, None, tuple(group)) for group in shared.values() if len(group) > 1]
    for task, each in attached:
        group = shared.get(each.launch or "", ()) if each.dispatch is None else ()
        if len(group) <= 1:
            launches.append(Launch(each.adapter.at(work.task_tokens[task]), share, task))
    return launches
