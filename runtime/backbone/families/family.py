"""What the runtime has to know of a family of backbones; each family is one module that fills this in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights
from runtime.distributed.sharding import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LayerBuilder(Protocol):
    """Makes layers of a family."""

    def __call__(
        self, spec: ModelSpec, weights: Weights, layer: int, rope: RopeTables | None, shard: Shard
    ) -> DecoderLayer:
        """Copy of the rank's part of one layer."""


def no_rope(spec: ModelSpec, config: PreTrainedConfig, device: str) -> None:
    """None: positions are learned."""
    del spec, config, device


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyParts:
    """How the parts of a backbone are made from its weights."""

    config: Callable[[ModelSpec, dict[str, Any]], PreTrainedConfig]
    """Configuration of a preset, with all dropouts 0; gets what all families have as well."""
    rope: Callable[[ModelSpec, PreTrainedConfig, str], RopeTables | None] = no_rope
    """Rotary tables on a device, which all layers of a stage share."""
    embedding: Callable[[ModelSpec, Weights, Shard], Embedding]
    """Copy of the rank's part of the embedding."""
    layer: LayerBuilder
    """Copy of the rank's part of one layer."""
    head: Callable[[ModelSpec, Weights, Shard], Head]
    """Copy of the rank's part of final norm and head, where the embeddings are tied, too."""
