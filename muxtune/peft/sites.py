"""Where a layer can be adapted, and in which order its parts run.

Each of a layer's four blocks has steps: what it does first (norm, attention, norm, activation), the copy of
the linears' input to tensor-parallel ranks, the rewriting of what linears read, the linears with what adds to
them, what works on their outputs, and what works on the whole block. The *depth* of a thing is its place in
that order. Backwards everything runs that lies deeper than the first trained thing, and nothing before it:
:func:`needs_backward` is the one place where that is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal

from muxtune.model import LAYER_INPUTS, LayerInput, ModelSpec

SiteKind = Literal["embedding", "linear", "block", "keys_values"]

EMBEDDING = -1
"""Number of the layer that the embedding counts as, and the depth of what is trained there."""


class Step(IntEnum):
    """Steps of a block of a layer."""

    BEGIN = 0
    COPY = 1
    REWRITE = 2
    LINEAR = 3
    OUTPUT = 4
    BLOCK = 5


def depth_of(block: int, step: Step) -> int:
    """Place of a step in the order in which a layer runs, from 0."""
    return len(Step) * block + step


def needs_backward(depth: int, trained: int) -> bool:
    """Whether a frozen thing has a backward in a layer.

    Args:
        depth: Depth of the frozen thing.
        trained: Depth of the first trained thing of the layer; ``EMBEDDING`` where something before the layer
            is trained.
    """
    return depth > trained


@dataclass(frozen=True, slots=True)
class Site:
    """One place of a layer, as one rank has it."""

    kind: SiteKind
    path: str
    """Path of a linear inside the layer, as Hugging Face names it; ``attention`` or ``mlp`` for a block."""
    position: int
    """Position among the sites of the layer, in the order of execution."""
    block: int
    """Number of the layer's block, 0 to 3, in which what is attached joins."""
    in_features: int
    """Features that it reads: a block, what its linears read; the embedding, none."""
    out_features: int
    split: Literal["outputs", "inputs", "none"] = "none"
    """How tensor-parallel ranks share it."""
    reads: LayerInput | None = None
    """Tensor of the layer that a linear or a block reads."""

    @property
    def split_by_outputs(self) -> bool:
        """Whether tensor-parallel ranks share its outputs."""
        return self.split == "outputs"


@lru_cache(maxsize=256)
def layer_sites(model: ModelSpec) -> tuple[Site, ...]:
    """What can be adapted in a layer, in the order of execution."""
    found: list[Site] = []

    def put(kind: SiteKind, path: str, block: int, widths: tuple[int, int], reads: LayerInput) -> None:
        found.append(Site(kind, path, len(found), block, *widths, reads=reads))

    for block, reads in enumerate(LAYER_INPUTS):
        for linear in model.linears:
            if linear.block == block:
                split: Literal["outputs", "inputs"] = "outputs" if linear.split_by_outputs else "inputs"
                widths = (linear.in_features, linear.out_features)
                found.append(
                    Site("linear", linear.name, len(found), block, *widths, split=split, reads=reads)
                )
        if block == 0:
            put("keys_values", "attention", block, (0, 2 * model.kv_heads * model.head_dim), reads)
        if block == 1:
            put("block", "attention", block, (model.hidden, model.hidden), "attention")
        if block == len(LAYER_INPUTS) - 1:
            put("block", "mlp", block, (model.hidden, model.hidden), "mlp")
    return tuple(found)


@lru_cache(maxsize=256)
def linear_sites(model: ModelSpec) -> tuple[Site, ...]:
    """The frozen linears of a layer, in the order of execution."""
    return tuple(site for site in layer_sites(model) if site.kind == "linear")


def site_of(model: ModelSpec, kind: SiteKind, path: str) -> Site:
    """The site of a kind at a path; there is one."""
    return next(site for site in layer_sites(model) if (site.kind, site.path) == (kind, path))


def embedding_site(model: ModelSpec) -> Site:
    """The output of the embedding."""
    return Site("embedding", "embedding", EMBEDDING, EMBEDDING, 0, model.hidden)
