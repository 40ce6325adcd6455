"""What memory contiguous groups of tasks need, estimated: which can be there at all, and which surely fit.

The exact answer needs a schedule (:mod:`muxtune.planning.problem.memory_limit`) and is asked of the
partitions that a search looks at. Two ends are estimated for all groups: at least, a stage holds a group's
own micro-batches; at most, all micro-batches that it may have open are as large. Only the first and the last
stage are looked at: the one has most micro-batches open, the other the logits.
"""

# Shapes, in names in lower case: n tasks, W widest group

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    everywhere,
    first_trained,
    stage_layers,
    stages_layers,
)
from muxtune.planning.decisions.partition_dp import Places
from muxtune.planning.decisions.structure import Mesh
from muxtune.planning.estimate.curves import Floats
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
    """Bytes that a micro-batch keeps if everything is adapted."""
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
        read_off = _read_off(bands, mesh, stage, in_flight)

        def bytes_nw(slopes: tuple[float, float]) -> Floats:
            return np.asarray(prices.tokens_nw * slopes[0] + targets * slopes[1])

        stages.append(
            _StageRoom(
                in_flight=in_flight,
                free_bytes=read_off.free_bytes,
                least_nw=bytes_nw(read_off.least),
                kept_nw=bytes_nw(read_off.kept),
                passing_nw=bytes_nw(read_off.passing),
            )
        )
    memory_bytes = bands.problem.cluster.device.memory_bytes
    return Room(tuple(stages), prices.microbatches_nw, bands.allowed_nw, memory_bytes)


class _ReadOff(NamedTuple):
    """What a stage has room for, and what a micro-batch needs per token and per target."""

    free_bytes: float
    least: tuple[float, float]
    kept: tuple[float, float]
    passing: tuple[float, float]


def _read_off(bands: GroupBands, mesh: Mesh, stage: int, in_flight: int) -> _ReadOff:
    """Bytes of a stage; the meshes of a search, and their cuts, have many stages that are alike."""
    layers = stages_layers(bands.problem.model, bands.pefts, mesh.layers_per_stage)[stage]
    first, last = stage == 0, stage == mesh.pp - 1
    key = layers, first, last, mesh.tp, in_flight
    found = bands.stage_bytes.get(key)
    if not isinstance(found, _ReadOff):
        probe = _Probe(bands, layers, in_flight, Sharding(tp=mesh.tp), first=first, last=last)
        found = _ReadOff(
            probe.free_bytes(), probe.kept(adapted=False), probe.kept(adapted=True), probe.passing()
        )
        bands.stage_bytes[key] = found
    return found


class _Probe:
    """Reads bytes per token off the memory model of a stage."""

    def __init__(
        self,
        bands: GroupBands,
        layers: LayerRuns,
        in_flight: int,
        sharding: Sharding,
        *,
        first: bool,
        last: bool,
    ) -> None:
        self._problem = bands.problem
        self._model = bands.problem.model
        self._pefts = bands.pefts
        self._layers = layers
        self._first, self._last = first, last
        self._in_flight = in_flight
        self._sharding = sharding
        self._all = everywhere(1)
        self._least = [at_first_linear(self._model), *_unlike(self._model, bands.pefts)]

    def free_bytes(self) -> float:
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

    def kept(self, *, adapted: bool) -> tuple[float, float]:
        """Bytes that a micro-batch keeps from forward to backward, per token and per target."""

        def bytes_of(peft: PeftSpec, tokens: int, targets: int) -> float:
            kept = kept_bytes(
                self._model,
                self._layers,
                first=self._first,
                last=self._last,
                work=_work(peft, tokens, targets),
                sharding=self._sharding,
            )
            return kept.total_bytes / _PROBE

        pefts = [self._all] if adapted else self._least
        return min(bytes_of(peft, _PROBE, 0) for peft in pefts), bytes_of(self._all, 0, _PROBE)

    def passing(self) -> tuple[float, float]:
        """Bytes of messages and temporaries, per token and per target."""
        messages = (POSTED_AHEAD + self._in_flight + 1) * (not self._first)
        messages += (POSTED_AHEAD + 1) * (not self._last)

        def bytes_of(tokens: int, targets: int) -> float:
            work = _work(self._all, tokens, targets)
            workspace = max(
                measure(
                    self._model,
                    last=self._last,
                    work=work,
                    sharding=self._sharding,
                    device=self._problem.cluster.device.kind,
                )
                for measure in (forward_workspace_bytes, backward_workspace_bytes)
            )
            return (workspace + messages * message_bytes(self._model, tokens)) / _PROBE

        return bytes_of(_PROBE, 0), bytes_of(0, _PROBE)


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


def _work(peft: PeftSpec, tokens: int, targets: int) -> MicrobatchWork:
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=(0,),
        pefts=(peft,),
        attention=((1.0, 1, tokens),) if tokens else (),
        targets=float(targets),
    )
