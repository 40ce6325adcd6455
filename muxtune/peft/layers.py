"""Which layers of a backbone are alike for some tasks, and where in a stage training begins.

Layers that get the same attachments from all tasks are priced once. A stage is written as runs of layers that
are alike: ``((0, 2), (2, 28))`` are two layers as layer 0, then 28 as layer 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from muxtune.model import ModelSpec
from muxtune.peft.method import attachments, embedding_attachments
from muxtune.peft.representation import Attachment
from muxtune.peft.sites import EMBEDDING
from muxtune.peft.spec import PeftSpec

Run = tuple[int, int]
"""Number of a layer, and how many in a row are like it."""
LayerRuns = tuple[Run, ...]
Layers = int | LayerRuns
"""Layers of a stage; a number stands for so many that are all like layer 0."""

Specs = tuple[PeftSpec, ...]


def runs_of(layers: Layers) -> LayerRuns:
    """The layers as runs."""
    return ((0, layers),) if isinstance(layers, int) else layers


def count_layers(layers: Layers) -> int:
    """How many they are."""
    return layers if isinstance(layers, int) else sum(n for _, n in layers)


@lru_cache(maxsize=4096)
def alike_layers(model: ModelSpec, spec: PeftSpec) -> tuple[int, ...]:
    """For each layer of a backbone the first one to which a task attaches the same."""
    first: list[int] = []
    found: list[tuple[int, object]] = []
    for layer in range(model.layers):
        each = attachments(spec, model, layer)
        like = next((known for known, other in found if each is other or each == other), None)
        if like is None:
            found.append((layer, each))
        first.append(layer if like is None else like)
    return tuple(first)


@lru_cache(maxsize=4096)
def layer_classes(model: ModelSpec, specs: Specs) -> tuple[int, ...]:
    """For each layer of a backbone the first one to which every one of some tasks attaches the same."""
    columns = [alike_layers(model, spec) for spec in dict.fromkeys(specs)]
    if not any(any(column) for column in columns):
        return (0,) * model.layers
    seen: dict[tuple[int, ...], int] = {}
    return tuple(seen.setdefault(row, layer) for layer, row in enumerate(zip(*columns, strict=True)))


@lru_cache(maxsize=1 << 14)
def stage_layers(model: ModelSpec, specs: Specs, start: int, stop: int) -> LayerRuns:
    """Layers from ``start`` up to ``stop`` as runs that are alike for some tasks."""
    classes = layer_classes(model, specs)[start:stop]
    return tuple((like, len(list(members))) for like, members in groupby(classes))


def stages_layers(model: ModelSpec, specs: Specs, layers_per_stage: Sequence[int]) -> list[LayerRuns]:
    """The layers of every stage."""
    found, start = [], 0
    for layers in layers_per_stage:
        found.append(stage_layers(model, specs, start, start + layers))
        start += layers
    return found


def stage_attachments(
    model: ModelSpec, layers: Layers, spec: PeftSpec, *, first: bool
) -> list[tuple[Attachment, int]]:
    """What a task attaches to a stage, and how often.

    Args:
        model: The backbone, or a shard of it.
        layers: Layers of the stage.
        spec: The task's method.
        first: Whether the stage begins with the embedding.
    """
    found = [(each, n) for layer, n in runs_of(layers) for each in attachments(spec, model, layer)]
    return [(each, 1) for each in embedding_attachments(spec, model)] + found if first else found


class Begin(NamedTuple):
    """The first trained thing of a stage before which nothing is trained."""

    run: int
    """Number of the run of layers whose first layer has it."""
    depth: int
    """Its depth in that layer; ``EMBEDDING`` where the embedding has it."""


@lru_cache(maxsize=4096)
def first_trained(model: ModelSpec, specs: Specs, layers: LayerRuns) -> Begin | None:
    """The first trained thing of the first stage of all, of any of some tasks; None if it has none."""
    if any(embedding_attachments(spec, model) for spec in specs):
        return Begin(0, EMBEDDING)
    for run, (layer, _) in enumerate(layers):
        depths = [each.depth for spec in specs for each in attachments(spec, model, layer)]
        if depths:
            return Begin(run, min(depths))
    return None


def backward_layers(
    model: ModelSpec, specs: Specs, layers: LayerRuns, *, first: bool
) -> tuple[LayerRuns, Run | None, int]:
    """Layers of a stage that have a backward.

    Args:
        model: The backbone, or a shard of it.
        specs: Tasks of an hTask.
        layers: Layers of the stage.
        first: Whether nothing comes before them.

    Returns:
        Runs of layers with a whole backward; the layer before them whose backward ends at the first trained
        thing, if there is one; and the depth of that thing.
    """
    if not first:
        return layers, None, EMBEDDING
    begin = first_trained(model, specs, layers)
    if begin is None:
        return (), None, EMBEDDING
    if begin.depth == EMBEDDING:
        return layers, None, EMBEDDING
    (layer, n), rest = layers[begin.run], layers[begin.run + 1 :]
    return ((layer, n - 1), *rest) if n > 1 else rest, (layer, 1), begin.depth
