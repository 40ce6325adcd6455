"""What memory contiguous groups of tasks need, estimated: which can be there at all, and which surely fit.

The exact answer needs a schedule (:mod:`muxtune.planning.problem.memory_limit`) and is asked of the
partitions that a search looks at. Two ends are estimated for all groups: at least, a stage holds a group's
own micro-batches; at most, all micro-batches that it may have open are as large. Only the first and the last
stage are looked at: the one has most micro-batches open, the other the logits.
"""

# Shapes, in names in lower case: n tasks, W widest group

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import row_slots
from muxtune.cluster import DeviceKind
from muxtune.costs.compose import MicrobatchWork, message_bytes
from muxtune.memory import CUDA_ALLOCATOR_FRACTION, backbone_bytes, table_bytes
from muxtune.memory.peak import POSTED_AHEAD
from muxtune.memory.saved_activations import kept_bytes
from muxtune.memory.weights import MOMENTS, Sharding, adapter_dtype_bytes, adapter_parameters
from muxtune.memory.workspace import backward_workspace_bytes, forward_workspace_bytes
from muxtune.model import ModelSpec
from muxtune.peft import (
    LayerRuns,
    PeftSpec,
    Specs,
    at_first_linear,
    attachments,
    embedding_attachments,
    everywhere,
    extra,
    first_trained,
    stage_layers,
    stages_layers,
)
from muxtune.planning.decisions.partition_dp import Places
from muxtune.planning.decisions.structure import Mesh
from muxtune.planning.estimate.curves import Floats, Ints
from muxtune.planning.estimate.group_seconds import GroupBands, GroupPrices

_PROBE = 1 << 20
"""Tokens, or targets, that bytes per token are read off at."""


@dataclass(frozen=True)
class _StageRoom:
    in_flight: int
    free_bytes: float
    """Bytes left beside weights, adapters, their optimizer states and gradients."""
    least_nw: Floats
    """Bytes that a micro-batch keeps, whatever is adapted."""
    kept_nw: Floats
    """Bytes that a micro-batch keeps if everything is adapted, and all of it is of the hungriest task."""
    passing_nw: Floats
    """Bytes of messages and temporaries."""


@dataclass(frozen=True)
class Room:
    """Room for groups on a mesh."""

    stages: tuple[_StageRoom, ...]
    microbatches_nw: NDArray[np.int64]
    allowed_nw: NDArray[np.bool_]
    """Groups that may be, whatever they need."""
    memory_bytes: int
    """Memory of a device."""

    @property
    def possible_nw(self) -> NDArray[np.bool_]:
        """Groups whose own micro-batches have room."""
        possible = self.allowed_nw.copy()
        for stage in self.stages:
            own = np.minimum(self.microbatches_nw, stage.in_flight)
            possible &= own * stage.least_nw <= stage.free_bytes
        return possible

    @property
    def safe_nw(self) -> NDArray[np.bool_]:
        """Groups that fit even if every open micro-batch is as large as theirs."""
        safe = self.allowed_nw.copy()
        for stage in self.stages:
            safe &= stage.in_flight * stage.kept_nw + stage.passing_nw <= stage.free_bytes
        return safe

    def needed_bytes(self, places: Places, inside: NDArray[np.bool_]) -> Floats:
        """What surely suffices for partitions on the stage with least room, by estimate.

        It is above the memory where their largest micro-batches have no room if they are open at once.

        Args:
            places: Places of the groups of some partitions, ``[P, H]``.
            inside: Whether there is a group.
        """
        excess = np.full(len(inside), -np.inf)
        for stage in self.stages:
            copies = np.where(inside, np.minimum(self.microbatches_nw[places], stage.in_flight), 0)
            kept = stage.kept_nw[places]
            largest_first = np.argsort(-kept, axis=1, kind="stable")
            copies = np.take_along_axis(copies, largest_first, 1)
            before = np.cumsum(copies, axis=1) - copies
            opened = np.clip(stage.in_flight - before, 0, copies)
            most = (opened * np.take_along_axis(kept, largest_first, 1)).sum(axis=1)
            most += np.where(inside, stage.passing_nw[places], -np.inf).max(axis=1)
            excess = np.maximum(excess, most - stage.free_bytes)
        return np.asarray(self.memory_bytes + excess)


def room_for_groups(bands: GroupBands, prices: GroupPrices, mesh: Mesh) -> Room:
    """Estimate all groups on a mesh."""
    targets = bands.sum(bands.batches.targets_n) / (prices.microbatches_nw * mesh.dp)
    stages = []
    for stage in sorted({0, mesh.pp - 1}):
        in_flight = mesh.pp - stage - 1 + prices.run
        messages = (POSTED_AHEAD + in_flight + 1) * (stage > 0)
        messages += (POSTED_AHEAD + 1) * (stage < mesh.pp - 1)
        read_off = _read_off(bands, mesh, stage)
        kept_targets = targets * read_off.kept_per_target
        passing_targets = targets * read_off.passing_per_target
        sent = messages * message_bytes(bands.problem.model, 1)
        stages.append(
            _StageRoom(
                in_flight=in_flight,
                free_bytes=read_off.free_bytes,
                least_nw=prices.tokens_nw * read_off.least + kept_targets,
                kept_nw=prices.tokens_nw * read_off.kept_nw + kept_targets,
                passing_nw=prices.tokens_nw * (read_off.passing_nw + sent) + passing_targets,
            )
        )
    memory_bytes = bands.problem.cluster.device.memory_bytes
    return Room(tuple(stages), prices.microbatches_nw, bands.allowed_nw, memory_bytes)


class _ReadOff(NamedTuple):
    """What a stage has room for, and what a micro-batch needs on it."""

    free_bytes: float
    least: float
    """Bytes that each token keeps at least."""
    kept_nw: Ints
    """Most bytes that a token of each group keeps."""
    passing_nw: Ints
    """Most bytes of temporaries for a token of each group."""
    kept_per_target: float
    passing_per_target: float


def _read_off(bands: GroupBands, mesh: Mesh, stage: int) -> _ReadOff:
    """Bytes of a stage; the meshes of a search, and their cuts, have many stages that are alike."""
    layers = stages_layers(bands.problem.model, bands.pefts, mesh.layers_per_stage)[stage]
    first, last = stage == 0, stage == mesh.pp - 1
    key = layers, first, last, mesh.tp
    found = bands.stage_bytes.get(key)
    if not isinstance(found, _ReadOff):
        found = _Probe(bands, layers, Sharding(tp=mesh.tp), first=first, last=last).read_off()
        bands.stage_bytes[key] = found
    return found


class _Probe:
    """Reads bytes per token off the memory model of a stage."""

    def __init__(
        self,
        bands: GroupBands,
        layers: LayerRuns,
        sharding: Sharding,
        *,
        first: bool,
        last: bool,
    ) -> None:
        self._bands = bands
        self._problem = bands.problem
        self._model = bands.problem.model
        self._pefts = bands.pefts
        self._layers = layers
        self._first, self._last = first, last
        self._sharding = sharding
        self._last_layer = layers[-1][0]
        self._neighbours = _neighbours(self._model, bands.pefts)
        self._least = [at_first_linear(self._model), *_unlike(self._model, bands.pefts)]

    def read_off(self) -> _ReadOff:
        """All that is asked of the stage."""
        kept_n, passing_n = self._most()
        targets = _work(self._neighbours, 0, targets=_PROBE)
        return _ReadOff(
            free_bytes=self._free_bytes(),
            least=min(self._kept(_work((peft,), _PROBE)) for peft in self._least) / _PROBE,
            kept_nw=self._bands.max(kept_n),
            passing_nw=self._bands.max(passing_n),
            kept_per_target=self._kept(targets) / _PROBE,
            passing_per_target=self._passing(targets) / _PROBE,
        )

    def _free_bytes(self) -> float:
        """What a stage has beside what it always holds, and the gradients of all adapters."""
        model, sharding = self._model, self._sharding
        parameters = sum(
            adapter_parameters(model, self._layers, peft, sharding, first=self._first) for peft in self._pefts
        )
        held = backbone_bytes(model, self._layers, first=self._first, last=self._last, sharding=sharding)
        held += table_bytes(model)
        held += (2 + MOMENTS) * parameters * adapter_dtype_bytes(model)
        device = self._problem.cluster.device
        fraction = CUDA_ALLOCATOR_FRACTION if device.kind == "cuda" else 0.0
        return device.memory_bytes / (1 + fraction) - held

    def _most(self) -> tuple[Ints, Ints]:
        """Most bytes that a token of each task keeps, and most that pass with it, beside any neighbours."""
        tasks = list(zip(self._pefts, _rows(self._bands), strict=True))
        unlike = {task: self._most_of(*task) for task in dict.fromkeys(tasks)}
        kept, passing = zip(*(unlike[task] for task in tasks), strict=True)
        return np.array(kept), np.array(passing)

    def _most_of(self, peft: PeftSpec, rows: _Rows) -> tuple[int, int]:
        # What neighbours make the base ops keep stands beside what the task keeps for its own tokens.
        works = [
            _work((*self._neighbours, peft), _PROBE, row=row, slots=rows.slots_per_token)
            for row in rows.lengths
        ]
        kept, passing = max(map(self._kept, works)), max(map(self._passing, works))
        return ceil(kept / _PROBE), ceil(passing / _PROBE)

    def _kept(self, work: MicrobatchWork) -> int:
        """Bytes that a micro-batch keeps from forward to backward."""
        return _kept_bytes(self._model, self._layers, self._first, self._last, work, self._sharding)

    def _passing(self, work: MicrobatchWork) -> int:
        """Bytes of temporaries."""
        device = self._problem.cluster.device.kind
        return _workspace_bytes(self._model, self._last, work, self._last_layer, self._sharding, device)


@lru_cache(maxsize=8192)
def _kept_bytes(
    model: ModelSpec, layers: LayerRuns, first: bool, last: bool, work: MicrobatchWork, sharding: Sharding
) -> int:
    return kept_bytes(model, layers, first=first, last=last, work=work, sharding=sharding).total_bytes


@lru_cache(maxsize=8192)
def _workspace_bytes(
    model: ModelSpec, last: bool, work: MicrobatchWork, layer: int, sharding: Sharding, device: DeviceKind
) -> int:
    return max(
        measure(model, last=last, work=work, layer=layer, sharding=sharding, device=device)
        for measure in (forward_workspace_bytes, backward_workspace_bytes)
    )


@lru_cache(maxsize=256)
def _neighbours(model: ModelSpec, pefts: Specs) -> Specs:
    """Methods that make base ops keep whatever some tasks' methods make them keep.

    A task that trains the embedding, as with soft prompts, lets the backward of all begin there.
    """
    at_embedding = (peft for peft in pefts if embedding_attachments(peft, model))
    return everywhere(1), *islice(at_embedding, 1)


class _Rows(NamedTuple):
    """A task's rows of attention."""

    slots_per_token: float
    lengths: tuple[int, ...]
    """Those to look at."""


def _rows(bands: GroupBands) -> Iterable[_Rows]:
    """Rows of each task.

    With keys in front of them, the shortest need most of these, and the longest the largest masks. Slots are
    a twentieth more than the mean, as some micro-batches have more short rows, and rounded up to one.
    """
    slots_n = np.sum([each.slots * each.sequences for each in bands.length_classes], axis=0)
    tokens_n = bands.batches.lengths_nsk.sum(axis=(1, 2)) / bands.batches.steps_n
    shares = ((np.ceil(slots_n / tokens_n * 20) + 1) / 20).tolist()
    for peft, share, lengths in zip(bands.pefts, shares, bands.batches.lengths_nsk, strict=True):
        if not extra(peft).keys:
            yield _Rows(share, (_PROBE,))
            continue
        ends = int(lengths[lengths > 0].min()), int(lengths.max())
        yield _Rows(share, tuple(sorted({row_slots(end) for end in ends})))


@lru_cache(maxsize=256)
def _unlike(model: ModelSpec, pefts: Specs) -> tuple[PeftSpec, ...]:
    """Methods that differ in which inputs of base ops they make a layer keep, or in where training begins."""
    unlike = {_kept_of(model, peft): peft for peft in pefts}
    return tuple(unlike.values())


@lru_cache(maxsize=8192)
def _kept_of(model: ModelSpec, peft: PeftSpec) -> tuple[object, ...]:
    layers = stage_layers(model, (peft,), 0, model.layers)
    inputs = {
        layer: frozenset(each.site.reads for each in attachments(peft, model, layer) if each.keeps_input)
        for layer, _ in layers
    }
    return layers, tuple(inputs.items()), first_trained(model, (peft,), layers)


def _work(
    pefts: Specs, tokens: int, *, targets: int = 0, row: int | None = None, slots: float = 1.0
) -> MicrobatchWork:
    """Work of tasks that have no token; or, in rows of some length, of which the last has all."""
    keys = 0 if row is None else extra(pefts[-1]).keys
    length = row or tokens
    calls = (slots, tokens // length, length) if tokens else None
    # Rows of one length may be the stream as it lies; those of more lengths are gathered from it.
    others = () if row is None else ((0.0, 1, length),)
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=(*[0] * (len(pefts) - 1), 0 if row is None else tokens),
        pefts=pefts,
        attention=(calls, *others) if calls and not keys else (),
        carried_attention=((*calls, row_slots(length + keys)),) if calls and keys else (),
        targets=float(targets),
    )
