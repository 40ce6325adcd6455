"""Seconds of a stage's parts at many sizes: what a search ranks by.

The frozen operators of a micro-batch depend on the length of its stream alone; what its tasks add depends on
their own tokens. Every part of :mod:`muxtune.graph` is priced as a function of that one number.

Adapters of several tasks at one base op may share a launch, and no sum over tasks says what it takes. A group
lies between two ends: one adapter with the tokens of all, and one launch for each task. Where between (or a
little beyond) is found out once, on tasks of the workload, for some numbers of them.

Prices are kept from problem to problem. So what is kept is determined by its key alone: the grid of a curve
comes from the curve and from ``largest_tokens``, never from the sizes that somebody happens to ask for first,
and what depends on the tasks of a workload is not kept (:meth:`StagePrices.between`).
"""

# Shapes, in names in lower case: n tasks

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import row_slots
from muxtune.costs.base import CostModel
from muxtune.costs.compose import p2p_seconds
from muxtune.graph import Node, Part, node_seconds, part_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.model import ModelSpec
from muxtune.operators import KINDS, PHASES, Operator, OperatorShape, Phase
from muxtune.peft import Attachment, PeftSpec, Specs, attachments, layer_classes
from muxtune.placement import Route
from muxtune.planning.estimate.curves import Curve, Floats, Ints, round_tokens, sample_curve


@dataclass(frozen=True, slots=True)
class AdaptedOps:
    """Adapters at base ops of a layer that are alike: the same widths, adapted by the same tasks."""

    adapter: OperatorShape
    """Operator of one of them; the tasks of a launch may differ in the mixed dimension of its kind."""
    dispatch: OperatorShape | None
    shared: bool
    """Whether they share a launch."""
    count: float
    """Base ops of a layer, on average over the layers."""
    tasks_n: NDArray[np.bool_]
    size_n: Floats
    """Size of the mixed dimension for each task; 0 where there is none."""

    def sized(self, size: int) -> OperatorShape:
        """Operator with that size of the mixed dimension."""
        mixed = KINDS[self.adapter.kind].mixed
        if mixed is None:
            return self.adapter
        dims = self.adapter.dims
        return OperatorShape(self.adapter.kind, (*dims[:mixed], size, *dims[mixed + 1 :]))


class StagePrices:
    """Seconds of the parts of an action, forward and backward together, on one of ``tp`` ranks.

    Args:
        costs: Costs of the whole backbone.
        model: The backbone.
        tp: Ranks that share a stage.
        largest_tokens: Tokens of the largest stream that will be asked for.
        points: Sizes at which curves are sampled.
    """

    def __init__(self, costs: CostModel, model: ModelSpec, tp: int, largest_tokens: int, points: int) -> None:
        self._costs = costs if tp == 1 else costs.shard(tp)
        self._model = model
        self.shard = model.shard(tp)
        """What a rank has of the backbone."""
        self._tp = tp
        self._largest = largest_tokens
        self._points = points
        self._curves: dict[tuple[object, ...], Curve] = {}
        self._apart = np.ones(1), np.zeros(1)

    def between(self, pefts: Sequence[PeftSpec], tokens: Sequence[int]) -> StagePrices:
        """These prices, with shared launches of adapters placed between their two ends by these tasks.

        Args:
            pefts: Methods of all tasks.
            tokens: Tokens of each task in a micro-batch.
        """
        placed = copy.copy(self)  # with the same curves
        placed._apart = self._place_between(pefts, tokens)
        return placed

    @cached_property
    def action_s(self) -> float:
        """What a forward and a backward cost beside their operators."""
        return sum(self._costs.action_s(0.0, phase) for phase in PHASES)

    def layer_s(self, tokens: Ints) -> Floats:
        """Frozen operators of a layer, attention apart, in streams of some lengths."""
        distinct, inverse = np.unique(np.maximum(tokens, 1), return_inverse=True)
        rounded = round_tokens(distinct)
        known = self._curves.get(
            ("layers",), Curve(np.zeros(1), np.zeros(1))
        )  # exact at every size asked for
        new = np.setdiff1d(rounded, known.sizes)
        if len(new):
            sizes = np.concatenate([known.sizes, new])
            seconds = np.concatenate([known.seconds, self._layers_s(new)])
            order = np.argsort(sizes)
            known = self._curves["layers",] = Curve(sizes[order], seconds[order])
        return np.asarray(known(rounded.astype(np.float64))[inverse].reshape(tokens.shape))

    def _layers_s(self, tokens: Ints) -> Floats:
        seconds = np.zeros(len(tokens))
        sizes = tokens.astype(np.float64)
        for phase in PHASES:
            seconds += self._curve(("layer", phase), partial(self._others_s, phase=phase))(sizes)
            for node in self._nodes(_LAYER, _work(8), phase):
                if node.op.kind == "linear":
                    i, o, _ = node.op.dims
                    seconds += node.count * self._costs.linear_latencies_s(i, o, tokens, phase)
        return seconds

    def links_s(self, tokens: Floats) -> Floats:
        """The part of :meth:`layer_s` that ranks of a stage communicate."""

        def collectives_s(size: int) -> float:
            return sum(
                node_seconds(node, self._costs, phase)
                for phase in PHASES
                for node in self._nodes(_LAYER, _work(size), phase)
                if node.stream == "communication"
            )

        if self._tp == 1:
            return np.zeros(tokens.shape)
        return self._curve(("links",), collectives_s)(tokens)

    def first_s(self, tokens: Floats, depth: int) -> Floats:
        """Further seconds of the first stage: the embedding, less what its first layer has no backward of.

        Args:
            tokens: Tokens of the streams.
            depth: Depth of the first thing that a task of the hTask trains, in the first layer that has any;
                ``EMBEDDING`` if all of that has a backward.
        """
        first = Part("layer", trained=depth)

        def more_s(size: int) -> float:
            work = _work(size)
            begun = self._part_s(Part("embedding"), work, "fwd") + self._part_s(first, work, "bwd")
            return begun - self._part_s(_LAYER, work, "bwd")

        return self._curve(("first", depth), more_s)(tokens)

    def last_s(self, targets: Floats) -> Floats:
        """Head and loss of so many predicted tokens."""

        def head_s(size: int) -> float:
            return sum(self._part_s(Part("head"), _work(8, targets=size), phase) for phase in PHASES)

        return self._curve(("last",), head_s)(targets)

    def message_s(self, tokens: Floats) -> Floats:
        """Processor time for one neighbour."""
        return self._curve(
            ("message",), lambda size: sum(self._part_s(Part("send"), _work(size), phase) for phase in PHASES)
        )(tokens)

    def attention_s(self, sequences: Floats, slots: int, front: int = 0) -> Floats:
        """Attention of a layer in calls of so many sequences, each of ``slots`` behind ``front`` keys."""

        def call_s(size: int) -> float:
            op = Operator("attention", (size, slots))
            if front:
                op = Operator("carried_attention", (size, slots, row_slots(front + slots)))
            return sum(self._costs.latency_s(op, phase) for phase in PHASES)

        return self._curve(("attention", slots, front), call_s, tokens_each=slots)(sequences)

    def feed_s(self, sequences: Floats) -> Floats:
        """Seconds for the tensors of a micro-batch with so many sequences."""

        def call_s(size: int) -> float:
            return self._costs.latency_s(Operator("feed", (size,)), "fwd")

        return self._curve(("feed",), call_s, tokens_each=_SHORT_TOKENS)(sequences)

    def p2p_s(self, tokens: Floats, routes: Sequence[Route]) -> Floats:
        """Seconds until a neighbour has a micro-batch, by the slowest of some links; 0 without links."""

        def transfer_s(size: int) -> float:
            return p2p_seconds(self._costs, self._model, size, routes)

        return self._curve(("p2p", *routes), transfer_s)(tokens)

    def adapters_s(
        self, ops: AdaptedOps, tasks: Floats, tokens: Floats, size: Floats, alone_s: Floats
    ) -> Floats:
        """Seconds of a layer's adapters for whole groups that share launches.

        Args:
            ops: Alike base ops that are adapted.
            tasks: Tasks of a group that have an adapter there.
            tokens: Tokens of all these tasks together.
            size: Mean size of the mixed dimension of these tasks, weighted by tokens.
            alone_s: Sum over the tasks of what :meth:`adapter_s` says.
        """
        together_s = self.adapter_s(ops, tokens, size)
        apart = np.interp(tasks, *self._apart)
        return np.asarray(np.maximum(together_s + apart * (alone_s - together_s), 0.0))

    def adapter_s(self, ops: AdaptedOps, tokens: Floats, size: Floats) -> Floats:
        """A layer's adapters of one task at alike base ops, on average over neighbouring sizes."""
        kind = KINDS[ops.adapter.kind]
        if kind.mixed is None:
            return np.asarray(ops.count * self._shape_curve(ops.adapter)(tokens))
        few, many = kind.mixed_sizes
        low, high = (self._shape_curve(ops.sized(each))(tokens) for each in (few, many))
        share = (np.maximum(size, 1) - few) / (many - few)
        return np.asarray(ops.count * np.maximum(low + share * (high - low), 0.0))

    def dispatch_s(self, ops: AdaptedOps, tokens: Floats) -> Floats:
        """What one task dispatches by operators of its own at alike base ops of a layer."""
        assert ops.dispatch is not None
        return np.asarray(ops.count * self._shape_curve(ops.dispatch)(tokens))

    def _place_between(self, pefts: Sequence[PeftSpec], tokens: Sequence[int]) -> tuple[Floats, Floats]:
        """Numbers of tasks of a shared launch, and where between its two ends it lies with so many."""
        found = [each for each in adapted_ops(self._model, self.shard, tuple(pefts)) if each.shared]
        if not found:
            return np.ones(1), np.zeros(1)
        ops = max(found, key=lambda each: int(each.tasks_n.sum()))
        tasks = np.flatnonzero(ops.tasks_n)
        counts, apart = [1.0], [0.0]
        while counts[-1] < len(tasks):
            count = min(2 * int(counts[-1]), len(tasks))
            chosen = tasks[np.linspace(0, len(tasks) - 1, count).round().astype(int)]
            counts.append(float(count))
            apart.append(self._apart_of(ops, [(int(ops.size_n[t]), max(tokens[t], 1)) for t in chosen]))
        return np.array(counts), np.array(apart)

    def _apart_of(self, ops: AdaptedOps, adapters: Sequence[tuple[int, int]]) -> float:
        """Position of the true price: 0 where it is one adapter's, 1 where it is a sum over the tasks."""
        total = sum(tokens for _, tokens in adapters)
        one = ops.sized(round(sum(size * tokens for size, tokens in adapters) / total)).at(total)
        group = [ops.sized(size).at(tokens) for size, tokens in adapters]
        exact_s = sum(self._costs.group_latency_s(group, phase) for phase in PHASES)
        together_s = sum(self._costs.latency_s(one, phase) for phase in PHASES)
        alone_s = sum(self._costs.latency_s(op, phase) for phase in PHASES for op in group)
        return (exact_s - together_s) / (alone_s - together_s) if alone_s > together_s else 0.0

    def _shape_curve(self, shape: OperatorShape) -> Curve:
        def alone_s(size: int) -> float:
            return sum(self._costs.latency_s(shape.at(size), phase) for phase in PHASES)

        return self._curve((shape.kind, *shape.dims), alone_s)

    def _others_s(self, size: int, phase: Phase) -> float:
        nodes = self._nodes(_LAYER, _work(size), phase)
        return sum(node_seconds(node, self._costs, phase) for node in nodes if node.op.kind != "linear")

    def _part_s(self, part: Part, work: MicrobatchWork, phase: Phase) -> float:
        """Seconds of a part without its adapters."""
        nodes = self._nodes(part, work, phase)
        return sum(node_seconds(node, self._costs, phase) for node in nodes if node.role != "adapter")

    def _nodes(self, part: Part, work: MicrobatchWork, phase: Phase) -> tuple[Node, ...]:
        return part_graph(part, self._model, work, phase, tp=self._tp)

    def _curve(
        self, key: tuple[object, ...], seconds_of: Callable[[int], float], *, tokens_each: int = 1
    ) -> Curve:
        """The curve of this key, sampled when it is first asked for.

        Args:
            key: Determines the curve, ``tokens_each`` included.
            seconds_of: Price of a size.
            tokens_each: Tokens of a unit of size; the curve ends where the largest stream has as many units.
        """
        curve = self._curves.get(key)
        if curve is None:
            largest = max(1, self._largest // tokens_each)
            curve = self._curves[key] = sample_curve(seconds_of, largest, self._points)
        return curve


_SHORT_TOKENS = 8
"""Tokens of a short sequence."""

_LAYER = Part("layer")


@lru_cache(maxsize=64)
def adapted_ops(model: ModelSpec, shard: ModelSpec, pefts: Specs) -> tuple[AdaptedOps, ...]:
    """Where a layer has adapters of any task, on average over the layers; those that are alike come once.

    Args:
        model: The backbone, whole.
        shard: What a rank has of it.
        pefts: Methods of all tasks.
    """
    alike: dict[tuple[_Kind, tuple[int, ...]], int] = {}
    sizes: dict[tuple[_Kind, tuple[int, ...]], list[int]] = {}
    for layer, times in Counter(layer_classes(model, pefts)).items():
        tasks: dict[tuple[int, int, _Kind], list[tuple[int, int]]] = {}
        for task, peft in enumerate(pefts):
            for each in attachments(peft, shard, layer):
                kind, size = _kind_of(each)
                tasks.setdefault((each.site.block, each.site.position, kind), []).append((task, size))
        for (_, _, kind), members in tasks.items():
            key = kind, tuple(task for task, _ in members)
            alike[key] = alike.get(key, 0) + times
            sizes[key] = [size for _, size in members]
    found = []
    for (kind, alike_tasks), times in alike.items():
        mask, size_n = np.zeros(len(pefts), dtype=np.bool_), np.zeros(len(pefts))
        mask[list(alike_tasks)], size_n[list(alike_tasks)] = True, sizes[kind, alike_tasks]
        found.append(AdaptedOps(kind.adapter, kind.dispatch, kind.shared, times / model.layers, mask, size_n))
    return tuple(found)


class _Kind(NamedTuple):
    """Adapters that are alike but for their tokens, and for their mixed dimension."""

    adapter: OperatorShape
    dispatch: OperatorShape | None
    shared: bool


def _kind_of(each: Attachment) -> tuple[_Kind, int]:
    """Kind of an adapter, and the size of its mixed dimension."""
    shape, mixed = each.adapter, KINDS[each.adapter.kind].mixed
    size = 0
    if mixed is not None:
        size = shape.dims[mixed]
        shape = OperatorShape(shape.kind, (*shape.dims[:mixed], 0, *shape.dims[mixed + 1 :]))
    return _Kind(shape, each.dispatch, each.launch is not None and each.dispatch is None), size


def _work(tokens: int, *, targets: int = 0) -> MicrobatchWork:
    """Frozen operators of a stream."""
    return MicrobatchWork(tokens=tokens, task_tokens=(), pefts=(), attention=(), targets=float(targets))
