"""Shapes of a backbone: layers, linears, parameter counts."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, WithJsonSchema
from pydantic_core import PydanticCustomError

from muxtune.model.families import FAMILIES, LayerInput
from muxtune.support.errors import SpecError
from muxtune.support.strict_models import KeyModel, StrictModel

Dtype = Literal["float32", "float64", "bfloat16"]


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        *others, last = map(repr, FAMILIES)
        raise PydanticCustomError(
            "literal_error", "{expected}", {"expected": f"{', '.join(others)} or {last}"}
        )
    return name


Family = Annotated[
    str, AfterValidator(_known_family), WithJsonSchema({"enum": list(FAMILIES), "type": "string"})
]
"""Name of one of the families."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}

ALL_LINEAR = "all-linear"
"""Target that stands for every linear of a layer."""

LAYER_INPUTS: tuple[LayerInput, ...] = ("attention", "attended", "mlp", "inner")
"""What linears read, in the order of execution."""


class LinearSpec(StrictModel):
    """One frozen linear of a layer."""

    name: str
    """Path inside the layer, as Hugging Face names it, e.g. ``self_attn.q_proj``."""
    in_features: int
    out_features: int
    reads: LayerInput

    @property
    def block(self) -> int:
        """Number of its block among the layer's four, from 0; linears of a block read the same tensor."""
        return LAYER_INPUTS.index(self.reads)

    @property
    def split_by_outputs(self) -> bool:
        """How tensor-parallel ranks share it: its outputs, where it reads a norm's; its inputs otherwise."""
        return self.reads in {"attention", "mlp"}


MOST_LAYERS = 10_000
LARGEST_DIMENSION = 2**31 - 1
"""Largest dimension of a tensor: dimensions are 32-bit integers in the matrix libraries."""

_Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
_Dimension = Annotated[int, Field(gt=0, le=LARGEST_DIMENSION)]


class ModelSpec(KeyModel):
    """Shapes of a backbone, and where its weights come from."""

    name: str
    """Name of the backbone, a label."""
    family: Family
    """Architecture."""
    source: str
    """``preset`` (weights drawn from ``init_seed``) or a Hugging Face directory."""
    layers: _Layers
    """Decoder layers."""
    hidden: _Dimension
    """Width of the residual stream."""
    ffn: _Dimension
    """Inner width of the MLP."""
    heads: _Dimension
    """Attention heads."""
    kv_heads: _Dimension
    """Heads of keys and values; fewer than ``heads`` where these are shared."""
    head_dim: _Dimension
    """Width of a head."""
    vocab: _Dimension
    """Tokens of the vocabulary."""
    max_positions: _Dimension
    """Longest sequence."""
    activation: str
    """Activation of the MLP, as Hugging Face names it."""
    norm_eps: float = Field(gt=0)
    """Added to the variance in norms."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding's angles; unused where positions are learned."""
    attention_bias: bool = False
    """Whether the linears of attention add biases."""
    mlp_bias: bool = False
    """Whether the linears of the MLP add biases."""
    tied_embeddings: bool = False
    """Whether the head is the embedding's transpose."""
    init_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of a preset's weights."""
    dtype: Dtype = "float32"
    """Type of weights and activations."""
    _whole: ModelSpec | None = PrivateAttr(default=None)

    @property
    def whole(self) -> ModelSpec:
        """The backbone that this is a shard of; itself if it is none."""
        return self if self._whole is None else self._whole

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of weights and activations."""
        return DTYPE_BYTES[self.dtype]

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up-projection."""
        return FAMILIES[self.family].gated

    @property
    def rms_norm(self) -> bool:
        """Whether norms divide by the root mean square; otherwise they are layer norms, with a bias."""
        return FAMILIES[self.family].rms_norm

    @property
    def learned_positions(self) -> bool:
        """Whether positions are rows of a table; otherwise queries and keys are rotated."""
        return FAMILIES[self.family].positions is not None

    @property
    def position_offset(self) -> int:
        """Row of the position table for position 0."""
        return FAMILIES[self.family].position_offset

    @property
    def transposed_weights(self) -> bool:
        """Whether the linears are Hugging Face's Conv1D, with weights of shape [in, out]."""
        return FAMILIES[self.family].transposed_weights

    @property
    def layer_prefix(self) -> str:
        """Hugging Face module path of the layers; the layer's index follows."""
        return FAMILIES[self.family].layers

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The frozen linears of one layer, in the order of execution."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return tuple(
            LinearSpec(name=name, in_features=i, out_features=o, reads=reads)
            for name, i, o, reads in FAMILIES[self.family].linears(self.hidden, self.ffn, q, kv)
        )

    @lru_cache(maxsize=1024)  # noqa: B019  # specs are few, and asked about every operator of a search
    def shard(self, tp: int) -> ModelSpec:
        """What one of ``tp`` tensor-parallel ranks computes (arXiv 1909.08053): fewer heads, a narrower MLP.

        Linears and vocabulary follow. Shared key and value heads are repeated where they are fewer than
        ranks; a width that does not divide is rounded up, as the widest rank has it.

        Raises:
            SpecError: The heads cannot be dealt out evenly.
        """
        if tp < 1 or self.heads % tp:
            raise SpecError("parallelism.tp", tp, f"a divisor of {self.heads}, the heads of {self.name}")
        if tp == 1:
            return self
        shares = {name: -(-getattr(self, name) // tp) for name in ("heads", "kv_heads", "ffn", "vocab")}
        shard = self.model_copy(update=shares)
        shard._whole = self
        return shard

    def has_bias(self, linear: LinearSpec) -> bool:
        """Whether a linear of a layer adds a bias."""
        return self.attention_bias if linear.reads in {"attention", "attended"} else self.mlp_bias

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.hidden if self.rms_norm else 2 * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        weights = sum(linear.in_features * linear.out_features for linear in self.linears)
        biases = sum(linear.out_features for linear in self.linears if self.has_bias(linear))
        return weights + biases + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters that the first stage holds before its layers."""
        positions = self.max_positions + self.position_offset if self.learned_positions else 0
        return (self.vocab + positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """Parameters that the last stage holds after its layers (its own copy where embeddings are tied)."""
        return self.vocab * self.hidden + self.norm_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        tied = self.vocab * self.hidden if self.tied_embeddings else 0
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters - tied

    @property
    def loading_bytes(self) -> int:
        """What loading it whole needs (profiler, solo runs); presets are drawn in float32."""
        drawn = DTYPE_BYTES["float32"] if self.source == "preset" else 0
        return self.parameters * max(drawn, self.dtype_bytes)
