"""Estimated prices of all contiguous groups of tasks, on one rank of any stage of a mesh.

What a group costs is put together from :mod:`muxtune.planning.estimate.stream_tokens` (how long its stream
is) and :mod:`muxtune.planning.estimate.part_seconds` (what a stream of that length takes). Attention is
batched by length across tasks (:func:`muxtune.batches.group_by_length`); here sequences are sorted by
length once for all groups, and a call has as many as a micro-batch has on average.

The exact price of a group is :meth:`muxtune.planning.problem.problem.PlanningProblem.htask_times`; how far
the estimate is from it is tested.
"""

# Shapes, in names in lower case: n tasks, W widest group; bands [n, W] as in
# muxtune.planning.estimate.stream_tokens

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import PACKED_MULTIPLE, chunked_sizes, group_by_length, packed_sizes, row_slots
from muxtune.model import ModelSpec
from muxtune.peft import EMBEDDING, PeftSpec, extra, first_trained, stage_layers
from muxtune.placement import Route
from muxtune.planning.decisions.partition_dp import Places
from muxtune.planning.decisions.structure import Layout
from muxtune.planning.estimate.busiest_replica import BusiestReplica, LengthClass
from muxtune.planning.estimate.curves import Floats, Ints
from muxtune.planning.estimate.part_seconds import AdaptedOps, StagePrices, adapted_ops
from muxtune.planning.estimate.stream_tokens import (
    band_max,
    band_sum,
    dealt_lengths,
    load_batches,
    packed_tokens,
    padded_rows,
    sampled_steps,
)
from muxtune.planning.exact.seconds import StageKind
from muxtune.planning.problem.meshes import MeshShape
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.tasks import TaskData


@dataclass(frozen=True)
class LayoutBand:
    """All groups under one alignment."""

    layout: Layout
    tokens_nw: Ints
    """Length of the stream; 0 where a group cannot have this alignment."""
    task_tokens_nw: Floats
    """Tokens of all tasks' spans together, mean over the micro-batches."""


class GroupBands:
    """What is known of all contiguous groups before they are priced.

    Args:
        problem: The planning problem.
        task_ids: Tasks in the order in which groups are cut.
        width: Tasks of the widest group.
        layouts: Layouts that may be used.
        steps: Steps to look at; by default a sample.
        one_method: Whether only tasks of one PEFT method may share a group.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        task_ids: Sequence[str],
        width: int,
        layouts: Sequence[Layout],
        steps: Ints | None = None,
        *,
        one_method: bool = False,
    ) -> None:
        self.problem = problem
        self.task_ids = tuple(task_ids)
        self.width = width
        self.layouts = tuple(Layout(*layout) for layout in layouts)
        self.carry = min(layout.carry for layout in self.layouts)
        """Least carry of all layouts: that of groups whose micro-batches are not cut."""
        self.tasks: list[TaskData] = [problem.data[task_id] for task_id in task_ids]
        self.batches = load_batches(
            self.tasks, sampled_steps(self.tasks, problem.settings.sampled_steps) if steps is None else steps
        )
        self._declared = np.array([data.task.declared_microbatches for data in self.tasks])
        self._row_tokens = np.array([data.task.row_tokens for data in self.tasks])
        self.pefts = tuple(data.task.peft for data in self.tasks)
        self.one_method = one_method
        self.stage_bytes: dict[Hashable, object] = {}
        """What is known of the memory of stages; see :mod:`muxtune.planning.estimate.memory_bound`."""
        self.microbatches_nw = lru_cache(maxsize=None)(self._microbatches)
        self.layout_band = lru_cache(maxsize=None)(self._layout_band)

    def sum(self, values_n: Floats) -> Floats:
        """Sum over the tasks of every group, ``[n, W]`` (and further axes of ``values_n``)."""
        return band_sum(values_n, self.width)

    def max(self, values_n: Ints) -> Ints:
        """Maximum over the tasks of every group, ``[n, W]``."""
        return band_max(values_n, self.width)

    def members(self, places: Places) -> list[tuple[str, ...]]:
        """Task ids of the groups in some places."""
        ends_and_widths = zip(*(each.tolist() for each in places), strict=True)
        return [self.task_ids[end - w : end + 1] for end, w in ends_and_widths]

    def _packed(self, sizes_nsg: Ints, wanted_nw: NDArray[np.bool_], multiple: int) -> Ints:
        return packed_tokens(sizes_nsg, self.batches.steps_n, wanted_nw=wanted_nw, multiple=multiple)

    @cached_property
    def alone(self) -> Places:
        """Where the tasks stand as groups of their own."""
        return np.arange(len(self.tasks)), np.zeros(len(self.tasks), dtype=np.intp)

    @cached_property
    def exists_nw(self) -> NDArray[np.bool_]:
        """Whether a group exists: as many tasks as it is wide stand before its end."""
        return np.arange(self.width) <= np.arange(len(self.tasks))[:, None]

    @cached_property
    def allowed_nw(self) -> NDArray[np.bool_]:
        """Whether a group exists and its tasks may share an hTask."""
        if not self.one_method:
            return self.exists_nw
        names = [peft.method for peft in self.pefts]
        method_n = np.array([names.index(name) for name in names])
        return np.asarray(self.exists_nw & (self.max(method_n) == -self.max(-method_n)))

    def _microbatches(self, dp: int) -> Ints:
        """Micro-batches of every group on each of ``dp`` replicas; a carry group counts as one."""
        return np.maximum(self.max(-(-self._declared // dp)), 1)

    def _layout_band(self, layout: Layout, dp: int) -> LayoutBand:
        """All groups under one of the layouts."""
        alignment, chunk_tokens, carry = layout
        microbatches = self.microbatches_nw(dp)
        tokens = np.zeros(microbatches.shape, dtype=np.int64)
        task_tokens = np.zeros(microbatches.shape)
        rows = self.rows_nw
        for m in np.unique(microbatches[self.exists_nw]):
            groups = int(m) * dp
            wanted = (microbatches == m) & self.exists_nw
            if alignment == "pad":
                counts = padded_rows(self.batches, groups)
                found = self.sum(counts.astype(np.float64)).max(axis=2).astype(np.int64) * rows
                mean = self.sum(counts.sum(axis=1) / groups) * rows
            else:
                dealt = dealt_lengths(self.batches, groups)
                if chunk_tokens is None:
                    sizes, multiple = packed_sizes(dealt), PACKED_MULTIPLE
                else:
                    sizes, multiple = chunked_sizes(dealt, chunk_tokens), carry * chunk_tokens
                found = self._packed(sizes, wanted, multiple) // carry
                mean = self.sum(sizes.sum(axis=(1, 2)) / self.batches.steps_n / (groups * carry))
            tokens[wanted], task_tokens[wanted] = found[wanted], mean[wanted]
        return LayoutBand(layout, tokens, task_tokens)

    @cached_property
    def length_classes(self) -> list[LengthClass]:
        """Sequences per step of each task that share calls of attention, longest first."""
        found = []
        for front, behind_n in self.fronts:
            lengths = self.batches.lengths_nsk * behind_n[:, None, None]
            distinct = np.unique(lengths[lengths > 0])
            for group in group_by_length(distinct.tolist()):
                longest, shortest = int(distinct[group[0]]), int(distinct[group[-1]])
                inside = (lengths >= shortest) & (lengths <= longest)
                per_step = inside.sum(axis=(1, 2)) / self.batches.steps_n
                found.append(LengthClass(row_slots(longest), front, per_step))
        return sorted(found, key=lambda each: each.slots, reverse=True)

    @cached_property
    def fronts(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Numbers of keys in front of sequences, and the tasks that have so many."""
        keys_n = np.array([extra(peft).keys for peft in self.pefts])
        return [(int(keys), keys_n == keys) for keys in np.unique(keys_n)]

    @cached_property
    def most_tokens(self) -> int:
        """Most tokens of any stream: the sequences of all tasks in one micro-batch, padded to the longest."""
        sequences = self.batches.sizes_n
        widest = int(np.sort(sequences)[-self.width :].sum())
        return widest * int(self._row_tokens.max())

    @cached_property
    def typical_tokens(self) -> list[int]:
        """Mean tokens of each task's micro-batches, when it runs alone."""
        per_step = self.batches.lengths_nsk.sum(axis=(1, 2)) / self.batches.steps_n
        return [round(tokens) for tokens in per_step / self._declared]

    @cached_property
    def sequences_n(self) -> Floats:
        """Sequences of each task in a step."""
        return self.batches.sizes_n.astype(np.float64)

    @cached_property
    def rows_nw(self) -> Ints:
        """Row length of a group under ``pad``."""
        return self.max(self._row_tokens)


@dataclass(frozen=True)
class GroupPrices:
    """All contiguous groups, each under its cheapest alignment; forward and backward together."""

    microbatches_nw: Ints
    carry_nw: Ints
    """Micro-batches of a carry group."""
    layout_nw: NDArray[np.intp]
    """Position of the cheapest layout in the bands' layouts."""
    runner_up_nw: NDArray[np.intp]
    """Position of another layout that may be as cheap; the cheapest again where none is near."""
    tokens_nw: Ints
    layer_s_nw: Floats
    """Seconds of a micro-batch in a layer."""
    hidden_s_nw: Floats
    """Part of ``layer_s_nw`` that is gone if its communication, or else its computation, is hidden."""
    first_s_nw: Floats
    """Further seconds of the first stage."""
    last_s_nw: Floats
    """Further seconds of the last stage."""
    action_s_nw: Floats
    """Seconds on any stage beside its layers: fixed costs and feed."""
    message_s_nw: Floats
    """Processor seconds for each neighbour."""
    p2p_s_nw: Floats

    @property
    def run(self) -> int:
        """Micro-batches of the longest carry group."""
        return int(self.carry_nw.max())


def price_groups(
    bands: GroupBands, prices: StagePrices, shape: MeshShape, carry: int | None = None
) -> GroupPrices:
    """Estimate all groups on a mesh, whose busiest replica decides.

    Args:
        bands: Bands of the groups.
        prices: Prices of the groups' parts.
        shape: Shape of the mesh.
        carry: Carry of the layouts to choose from; the least by default.
    """
    carry, dp = carry or bands.carry, shape.dp
    messages = shape.on(bands.problem.cluster).message_routes()
    microbatches = bands.microbatches_nw(dp) * carry
    busiest = BusiestReplica(bands.batches, bands.length_classes, bands.sum, bands.microbatches_nw(dp), dp)
    numbers = [number for number, layout in enumerate(bands.layouts) if layout.carry == carry]
    candidates = [bands.layout_band(bands.layouts[number], dp) for number in numbers]
    priced = []
    for band in candidates:
        layer_s = prices.layer_s(band.tokens_nw)
        layer_s += _adapters_s(bands, prices, band, dp * busiest.share(band.layout.alignment))
        layer_s += _attention_s(bands, prices, band, busiest, microbatches)
        priced.append(np.where(band.tokens_nw > 0, layer_s, np.inf))
    layout = np.argmin(priced, axis=0)
    layer_s = np.min(priced, axis=0)
    tokens = np.choose(layout, [band.tokens_nw for band in candidates])
    sizes = tokens.astype(np.float64)
    links_s = prices.links_s(sizes)
    share = np.choose(layout, [busiest.share(band.layout.alignment) for band in candidates])
    return GroupPrices(
        microbatches_nw=microbatches,
        carry_nw=np.full(microbatches.shape, carry),
        layout_nw=np.array(numbers)[layout],
        runner_up_nw=np.array(numbers)[_runner_up(priced, layout, layer_s, bands.problem.settings.near)],
        tokens_nw=tokens,
        layer_s_nw=np.where(bands.exists_nw, layer_s, np.inf),
        hidden_s_nw=np.minimum(links_s, layer_s - links_s),
        first_s_nw=_first_s(bands, prices, sizes),
        last_s_nw=prices.last_s(share * bands.sum(bands.batches.targets_n) / microbatches),
        action_s_nw=prices.action_s + prices.feed_s(share * bands.sum(bands.sequences_n) / microbatches),
        message_s_nw=prices.message_s(sizes),
        p2p_s_nw=prices.p2p_s(sizes, messages),
    )


def with_messages(known: GroupPrices, prices: StagePrices, messages: Sequence[Route]) -> GroupPrices:
    """The prices on a mesh that differs in the links between stages alone."""
    return replace(known, p2p_s_nw=prices.p2p_s(known.tokens_nw.astype(np.float64), messages))


def join_prices(alternatives: Sequence[GroupPrices], chosen_nw: NDArray[np.intp]) -> GroupPrices:
    """One of several estimates for every group.

    Args:
        alternatives: Estimates of the same groups.
        chosen_nw: Position of each group's estimate in these.
    """
    return GroupPrices(
        **{
            each.name: np.choose(chosen_nw, [getattr(prices, each.name) for prices in alternatives])
            for each in fields(GroupPrices)
        }
    )


def _runner_up(
    priced: Sequence[Floats], layout_nw: NDArray[np.intp], least_s_nw: Floats, near: float
) -> NDArray[np.intp]:
    others = np.array(
        [np.where(layout_nw == number, np.inf, seconds) for number, seconds in enumerate(priced)]
    )
    return np.where(others.min(axis=0) <= near * least_s_nw, others.argmin(axis=0), layout_nw)


def group_steps_s(bands: GroupBands, kind: StageKind, tp: int) -> Floats:
    """Optimizer steps of every group's tasks on a kind of stage, ``[n, W]``."""
    return bands.sum(np.array([bands.problem.step_seconds(peft, kind, tp) for peft in bands.pefts]))


def _adapters_s(bands: GroupBands, prices: StagePrices, band: LayoutBand, excess: Floats) -> Floats:
    """Seconds of the adapters of a layer for every group.

    Tokens of a task's span are its share of the group's; under ``pad`` by its sequences.

    Args:
        bands: Bands of the groups.
        prices: Prices of the groups' parts.
        band: The groups under one alignment.
        excess: Tokens of the busiest replica, over the mean of all replicas.
    """
    share_n = bands.sequences_n if band.layout[0] == "pad" else _effective(bands)
    all_shares = bands.sum(share_n)
    per_share = band.task_tokens_nw / np.maximum(all_shares, 1e-9)
    typical = float(np.median(per_share[bands.exists_nw]))
    per_share = excess * per_share
    seconds = np.zeros(excess.shape)
    for ops in adapted_ops(bands.problem.model, prices.shard, bands.pefts):
        inside_n = share_n * ops.tasks_n
        if not ops.shared:
            seconds += _unshared_s(bands, prices, ops, inside_n, per_share)
            continue
        tokens = bands.sum(inside_n) * per_share
        size = bands.sum(inside_n * ops.size_n) * per_share / np.maximum(tokens, 1e-9)
        alone_n = prices.adapter_s(ops, inside_n * typical, ops.size_n)
        tasks = bands.sum(ops.tasks_n.astype(np.float64))
        seconds += prices.adapters_s(ops, tasks, tokens, size, bands.sum(alone_n * ops.tasks_n))
    return seconds


_UNSHARED_POINTS = 6
"""Sizes at which adapters that share no launch are priced, from the smallest spans to the largest."""


def _unshared_s(
    bands: GroupBands, prices: StagePrices, ops: AdaptedOps, inside_n: Floats, per_share: Floats
) -> Floats:
    """Adapters of a layer that run task by task: their sum for every group, on straight lines between sizes.

    Args:
        bands: Bands of the groups.
        prices: Prices of the groups' parts.
        ops: Base ops that are adapted.
        inside_n: Share of each task that has an adapter there.
        per_share: Tokens of a micro-batch for each unit of share, of every group.
    """
    known = per_share[bands.exists_nw & (per_share > 0)]
    if not len(known):
        return np.zeros(per_share.shape)
    points = np.unique(np.geomspace(known.min(), known.max(), _UNSHARED_POINTS))

    def sums_at(tokens_per_share: float) -> Floats:
        alone_n = prices.adapter_s(ops, inside_n * tokens_per_share, ops.size_n)
        if ops.dispatch is not None:
            alone_n += prices.dispatch_s(ops, inside_n * tokens_per_share)
        return bands.sum(alone_n * ops.tasks_n)

    sums = np.array([sums_at(point) for point in points])
    if len(points) == 1:
        return np.asarray(sums[0])
    above = np.clip(np.searchsorted(points, per_share), 1, len(points) - 1)
    lower, upper = (np.take_along_axis(sums, (above - back)[None], 0)[0] for back in (1, 0))
    share = np.clip((per_share - points[above - 1]) / (points[above] - points[above - 1]), 0.0, 1.0)
    return np.asarray(lower + share * (upper - lower))


def _effective(bands: GroupBands) -> Floats:
    return np.asarray(bands.batches.lengths_nsk.sum(axis=(1, 2)) / bands.batches.steps_n)


def _attention_s(
    bands: GroupBands, prices: StagePrices, band: LayoutBand, busiest: BusiestReplica, microbatches: Ints
) -> Floats:
    seconds = np.zeros(microbatches.shape)
    if band.layout[0] == "pad":
        for front, behind_n in bands.fronts:
            per_microbatch = busiest.share("pad") * bands.sum(bands.sequences_n * behind_n) / microbatches
            for row in np.unique(bands.rows_nw[bands.exists_nw]):
                at = bands.rows_nw == row
                seconds[at] += prices.attention_s(per_microbatch[at], row_slots(int(row)), front)
        return seconds
    for slots, front, sequences in busiest.classes:
        expected = sequences / microbatches
        present = -np.expm1(-expected)  # share of the micro-batches that have any, dealt by chance
        each = expected / np.maximum(present, 1e-12)
        seconds += present * prices.attention_s(each, slots, front)
    return seconds


def _first_s(bands: GroupBands, prices: StagePrices, tokens: Floats) -> Floats:
    """Further seconds of the first stage, by the first thing that any task of the group trains."""
    model = bands.problem.model
    depth_n = np.array([_first_depth(model, peft) for peft in bands.pefts])
    depth_nw = -bands.max(-depth_n)
    seconds = np.zeros(tokens.shape)
    for depth in np.unique(depth_n):
        at = depth_nw == depth
        seconds[at] = prices.first_s(tokens[at], int(depth))
    return seconds


def _first_depth(model: ModelSpec, peft: PeftSpec) -> int:
    begin = first_trained(model, (peft,), stage_layers(model, (peft,), 0, model.layers))
    return EMBEDDING if begin is None else begin.depth
