"""Forward and backward graph of one layer, with the adapters of all tasks and tensor-parallel collectives.

A layer is four blocks: norm and attention's inputs; attention and its output; norm and the MLP's inputs;
activation and the MLP's output. Linears that read the same input (queries, keys and values; gate and up) run
as one product. An adapter reads what its linear reads, and whoever reads the linear waits for it too. Dropout
stands between the two: forward it masks what the adapter reads, backward the gradient that the adapter gives.

**Tensor parallelism** (arXiv 1909.08053). The first and third block's linears are split by their outputs: the
forward has their input whole, the backward sums the input's gradient over the ranks. The second and fourth
block's are split by their inputs: the forward sums their outputs, the backward has the gradient whole. The
results of adapters are parts of the same sums, so they need no collectives of their own.

**Backward** is the forward turned around: who was read waits for its readers. Under tensor parallelism an
adapter's half that gives the gradients of its factors stands alone: it has no reader, and can run while
others communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.nodes import Node, Role, operator
from muxtune.graph.operators import Operator, Phase
from muxtune.graph.peft import Attachment, BaseOp, attachments, base_ops
from muxtune.model import ModelSpec
from muxtune.tasks import LoraSpec

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


@dataclass(frozen=True, slots=True)
class _Slot:
    """A node before its micro-batch is known."""

    kind: str
    block: int
    deps: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    """Widths of a linear; bytes per token and ranks of a collective."""
    phase: Phase | None = None
    """Phase in which a collective runs; None for what runs in both."""
    base: BaseOp | None = None
    """Frozen linear that an adapter is attached to."""
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
    input_gradient: bool = True,
    adapters: Launching = "grouped",
) -> tuple[Node, ...]:
    """Nodes of one layer for one micro-batch, as one of ``tp`` ranks runs them.

    Args:
        model: The backbone, whole.
        work: The micro-batch.
        phase: Forward or backward.
        tp: Tensor-parallel ranks.
        input_gradient: False for the backward of the first layer of all: nothing before it is trained, so
            the gradient stops at the first block that has an adapter, before that block's frozen operators.
        adapters: How those of several tasks at one base op are launched.

    Raises:
        SpecError: The backbone cannot be split into so many parts.
    """
    shard = model.shard(tp)
    adapted, *places = _adapted(shard, work.loras)
    slots = _slots(shard, *places, phase, tp, input_gradient or phase == "fwd")
    return _filled(slots, work, adapted, adapters)


def layer_launches(
    model: ModelSpec,
    work: MicrobatchWork,
    phase: Phase,
    *,
    tp: int = 1,
    input_gradient: bool = True,
    adapters: Launching = "grouped",
) -> Iterator[Launch]:
    """What the nodes of :func:`layer_graph` run, in their order, for those who need nothing else of them."""
    shard = model.shard(tp)
    adapted, *places = _adapted(shard, work.loras)
    slots = _slots(shard, *places, phase, tp, input_gradient or phase == "fwd")
    for slot in slots:
        attached = adapted[slot.base.position] if slot.base is not None else ()
        yield from _launches(slot, work, attached, adapters)


@lru_cache(maxsize=4096)  # a search asks for the same tasks with other tokens again and again
def _adapted(
    model: ModelSpec, loras: tuple[LoraSpec, ...]
) -> tuple[dict[int, list[tuple[int, Attachment]]], tuple[int, ...], tuple[int, ...]]:
    """By position of a linear, tasks and what they attach to it; those positions, and those with dropout."""
    adapted: dict[int, list[tuple[int, Attachment]]] = {}
    dropping: set[int] = set()
    for task, lora in enumerate(loras):
        for attachment in attachments(model, lora):
            adapted.setdefault(attachment.base.position, []).append((task, attachment))
            if attachment.dispatch.dropout:
                dropping.add(attachment.base.position)
    return adapted, tuple(sorted(adapted)), tuple(sorted(dropping))


@lru_cache(maxsize=4096)  # the hTasks of a search differ in sizes, rarely in what is adapted
def _slots(
    model: ModelSpec,
    positions: tuple[int, ...],
    dropping: tuple[int, ...],
    phase: Phase,
    tp: int,
    input_gradient: bool,
) -> tuple[_Slot, ...]:
    """Nodes of a layer whose linears at these positions have adapters, some with dropout."""
    adapted = [base_ops(model)[position] for position in positions]
    slots = _forward(model, adapted, dropping, tp)
    if phase == "bwd":
        slots = _turned_around(slots)
    slots = _keep(slots, lambda slot: slot.phase in {None, phase})
    if phase == "fwd":
        return slots
    first = -1 if input_gradient else min((base.block for base in adapted), default=len(_FIRST_KINDS))
    slots = _keep(slots, lambda slot: slot.block > first or (slot.block == first and slot.base is not None))
    return _halved(slots, first) if tp > 1 else slots


def _forward(
    model: ModelSpec, adapted: Sequence[BaseOp], dropping: Sequence[int], tp: int
) -> tuple[_Slot, ...]:
    """Forward with the collectives of both phases at the places where they belong."""
    sums = (model.hidden * model.dtype_bytes, tp)
    slots: list[_Slot] = []
    ends: tuple[int, ...] = ()

    def put(slot: _Slot) -> tuple[int, ...]:
        slots.append(slot)
        return (len(slots) - 1,)

    for block, shape in enumerate(frozen_products(model)):
        split_by_outputs = block % 2 == 0
        ends = put(_Slot(_FIRST_KINDS[block], block, ends))
        if tp > 1 and split_by_outputs:
            ends = put(_Slot("all_reduce", block, ends, sums, phase="bwd"))
        read = ends
        ends = put(_Slot("linear", block, read, shape))
        for base in adapted:
            if base.block == block:
                masked = base.position in dropping
                dropout = put(_Slot("dropout", block, read, base=base)) if masked else ()
                ends += put(_Slot("lora", block, read + dropout, base=base))
        if tp > 1 and not split_by_outputs:
            ends = put(_Slot("all_reduce", block, ends, sums, phase="fwd"))
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
    """Backward of adapters as two halves: the input's gradient, and those of the factors.

    Both take the same floating-point operations, ``2 r (in + out)`` per token. In block ``first`` nobody
    needs the input's. Dropout goes on with the input's.
    """
    slots = list(slots)
    masked = {slot.base for slot in slots if slot.kind == "dropout"}
    halves: list[_Slot] = []
    stands_for: list[int] = []
    for slot in slots:
        moved = replace(slot, deps=tuple(stands_for[dep] for dep in slot.deps))
        stands_for.append(len(halves))
        if slot.kind == "dropout" or slot.base is None:
            halves.append(replace(moved, leaf=slot.kind == "dropout" and slot.block == first))
            continue
        if slot.block == first:
            halves.append(replace(moved, leaf=slot.base not in masked))
            continue
        halves.append(replace(moved, share=0.5))
        halves.append(replace(slot, deps=(len(halves) - 1,), share=0.5, leaf=True, along=True))
    return tuple(halves)


def _filled(
    slots: Iterable[_Slot],
    work: MicrobatchWork,
    adapted: Mapping[int, Sequence[tuple[int, Attachment]]],
    adapters: Launching,
) -> tuple[Node, ...]:
    """Nodes of the slots; one may take several. A half that goes on with another does so node by node."""
    nodes: list[Node] = []
    places: list[tuple[int, ...]] = []
    for slot in slots:
        deps = tuple([place for dep in slot.deps for place in places[dep]])
        start = len(nodes)
        role: Role = "communication" if slot.kind == "all_reduce" else "base"
        attached: Sequence[tuple[int, Attachment]] = ()
        if slot.base is not None:
            role, attached = "adapter", adapted[slot.base.position]
        for i, (op, count, task, group) in enumerate(_launches(slot, work, attached, adapters)):
            nodes.append(Node(op, role, (deps[i],) if slot.along else deps, count, task, group, slot.leaf))
        places.append(tuple(range(start, len(nodes))))
    return tuple(nodes)


def _launches(
    slot: _Slot, work: MicrobatchWork, attached: Sequence[tuple[int, Attachment]], adapters: Launching
) -> list[Launch]:
    """What a slot runs; adapters run as one for all tasks, or one for each, as always with dropout."""
    if slot.kind == "dropout":
        assert slot.base is not None
        return [
            Launch(each.dispatch.operator(slot.base, work.task_tokens[task]), task=task)
            for task, each in attached
            if each.dispatch.dropout
        ]
    if slot.base is not None:
        return _adapter_launches(slot, slot.base, work, attached, adapters)
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
    slot: _Slot,
    base: BaseOp,
    work: MicrobatchWork,
    attached: Sequence[tuple[int, Attachment]],
    adapters: Launching,
) -> list[Launch]:
    operators = [
        (task, each.adapter.operator(base, work.task_tokens[task]), bool(each.dispatch.dropout))
        for task, each in attached
    ]
    group = [op for _, op, masked in operators if adapters == "grouped" and not masked]
    alone = [(task, op) for task, op, masked in operators if masked or len(group) <= 1]
    launches = [Launch(group[0], slot.share, None, tuple(group))] if len(group) > 1 else []
    return launches + [Launch(op, slot.share, task) for task, op in alone]
