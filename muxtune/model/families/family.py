"""What the domain has to know of a family of backbones; each family is one module that fills this in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muxtune.support.errors import SpecError

Fields = Mapping[str, Any]
"""Keys and values of a configuration."""

LayerInput = Literal["attention", "attended", "mlp", "inner"]
"""Tensor of a layer that a linear reads: output of the first norm (for queries, keys and values), attended
values, output of the second norm, and what the last linear of the MLP reads."""

LinearShape = tuple[str, int, int, LayerInput]
"""Path inside the layer, features in, features out, and what it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneFamily:
    """Decoders that differ in their shapes alone."""

    name: str
    """``model_type`` of its configurations."""
    executed_keys: frozenset[str]
    """Keys of a configuration whose every value is executed, or is refused where its shape is read."""
    fixed_keys: Fields
    """Keys that change what is computed, with the only value that is executed."""
    activation_key: str
    """Key that names the activation."""
    shapes: Callable[[Fields, Path], dict[str, Any]]
    """Shape fields of a :class:`muxtune.model.ModelSpec` from a configuration with its defaults; the path is
    its name in messages."""
    preset: Fields
    """Fields that all presets of the family have."""
    gated: bool = False
    """The MLP multiplies an activated gate with an up-projection."""
    rms_norm: bool = False
    """Norms divide by the root mean square; otherwise they are layer norms, with a bias."""
    transposed_weights: bool = False
    """The linears are Hugging Face's Conv1D, with weights of shape [in, out]."""
    layers: str
    """Path of the layers; a layer's number follows."""
    linears: Callable[[int, int, int, int], tuple[LinearShape, ...]]
    """Linears of one layer in the order of execution, from hidden size, MLP width, and the features of
    queries and of keys."""
    embedding: str
    """Name of the token embedding's tensor."""
    positions: str | None = None
    """Name of the table of positions; without one, queries and keys are rotated."""
    position_offset: int = 0
    """Row of that table for position 0."""
    layer_norms: tuple[str, str]
    """Paths inside the layer."""
    final_norm: str
    """Path of the norm before the head."""
    other_modules: tuple[str, ...] = ()
    """Paths of modules beside the layers that have no weights."""
    other_layer_modules: tuple[str, ...]
    """Paths inside the layer of modules that have no weights."""
    derived_tensors: re.Pattern[str]
    """Buffers that older versions of transformers stored although the configuration gives them."""
    bias_keys: tuple[str, str] = ("attention_bias", "mlp_bias")
    """Keys that say whether the linears of the attention and those of the MLP have a bias."""

    @property
    def prefix(self) -> str:
        """What stands before the names of a model with a head, and not before those of one without."""
        return self.embedding.split(".", 1)[0]


def head_dim(c: Fields, width: str, heads: str, where: Path) -> int:
    """Features of a head, where the heads share the hidden size.

    Args:
        c: The configuration.
        width: Key of the hidden size.
        heads: Key of the number of heads.
        where: Name of the configuration in messages.

    Raises:
        SpecError: The heads do not divide it.
    """
    if c[heads] < 1 or c[width] % c[heads]:
        raise SpecError(f"{where}: {heads}", c[heads], f"a divisor of {width}, {c[width]}")
    dim: int = c[width] // c[heads]
    return dim


def says_nothing(value: object) -> bool:
    """Whether a key with this value might as well not be there."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
