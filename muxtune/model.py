"""The backbone: a frozen decoder-only transformer, described by its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxtune.errors import SpecError, spec_error_from, unknown_name

Dtype = Literal["float32", "float64", "bfloat16"]
Family = Literal["llama", "gpt2"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}


class LinearSpec(BaseModel):
    """One frozen linear of a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Path inside the layer, as Hugging Face names it, e.g. ``self_attn.q_proj``."""
    in_features: int
    out_features: int


class ModelSpec(BaseModel):
    """Shapes of a backbone, and where its weights come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: Family
    source: str
    """``preset`` (weights drawn from ``init_seed``) or a Hugging Face directory."""
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    ffn: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    activation: str
    norm_eps: float = Field(gt=0)
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    init_seed: int = 0
    dtype: Dtype = "float32"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of weights and activations."""
        return DTYPE_BYTES[self.dtype]

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up-projection (Llama style)."""
        return self.family == "llama"

    @property
    def layer_prefix(self) -> str:
        """Hugging Face module path of the layers; the layer's index follows."""
        return "model.layers" if self.family == "llama" else "transformer.h"

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The frozen linears of one layer, in the order of execution."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: tuple[tuple[str, int, int], ...]
        if self.family == "llama":
            shapes = (
                ("self_attn.q_proj", self.hidden, q),
                ("self_attn.k_proj", self.hidden, kv),
                ("self_attn.v_proj", self.hidden, kv),
                ("self_attn.o_proj", q, self.hidden),
                ("mlp.gate_proj", self.hidden, self.ffn),
                ("mlp.up_proj", self.hidden, self.ffn),
                ("mlp.down_proj", self.ffn, self.hidden),
            )
        else:
            shapes = (
                ("attn.c_attn", self.hidden, 3 * self.hidden),
                ("attn.c_proj", self.hidden, self.hidden),
                ("mlp.c_fc", self.hidden, self.ffn),
                ("mlp.c_proj", self.ffn, self.hidden),
            )
        return tuple(LinearSpec(name=name, in_features=i, out_features=o) for name, i, o in shapes)

    def targeted_linears(self, targets: tuple[str, ...], field: str) -> tuple[LinearSpec, ...]:
        """The linears that PEFT would adapt for these ``target_modules``, in the order of execution.

        A target matches a module whose path is the target or ends with ``.target`` (PEFT's rule for lists);
        ``all-linear`` matches every linear of a layer.

        Raises:
            SpecError: A target matches nothing; it would silently train nothing.
        """
        if targets == ("all-linear",):
            return self.linears
        for target in targets:
            if not any(_matches(linear.name, target) for linear in self.linears):
                known = ", ".join(linear.name.rsplit(".", 1)[-1] for linear in self.linears)
                raise SpecError(field, target, f"a linear of {self.name}: {known}, or all-linear alone")
        return tuple(linear for linear in self.linears if any(_matches(linear.name, t) for t in targets))

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        linears = sum(linear.in_features * linear.out_features for linear in self.linears)
        if self.family == "llama":
            bias = self.attention_bias * (self.heads + 2 * self.kv_heads) * self.head_dim
            bias += self.attention_bias * self.hidden + self.mlp_bias * (2 * self.ffn + self.hidden)
            return linears + bias + 2 * self.hidden
        return linears + sum(linear.out_features for linear in self.linears) + 4 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters that the first stage holds before its layers."""
        positions = self.max_positions * self.hidden if self.family == "gpt2" else 0
        return self.vocab * self.hidden + positions

    @property
    def head_parameters(self) -> int:
        """Parameters that the last stage holds after its layers (its own copy where embeddings are tied)."""
        norm = self.hidden if self.family == "llama" else 2 * self.hidden
        return self.vocab * self.hidden + norm

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        tied = self.vocab * self.hidden if self.tied_embeddings else 0
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters - tied


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


BYTE_VOCAB = 264
"""256 bytes, BOS, EOS and padding, rounded up to a multiple of 8."""

PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="llama-tiny",
            family="llama",
            source="preset",
            layers=8,
            hidden=256,
            ffn=688,
            heads=8,
            kv_heads=4,
            head_dim=32,
            vocab=BYTE_VOCAB,
            max_positions=1024,
            activation="silu",
            norm_eps=1e-5,
        ),
        ModelSpec(
            name="gpt2-tiny",
            family="gpt2",
            source="preset",
            layers=6,
            hidden=256,
            ffn=1024,
            heads=8,
            kv_heads=8,
            head_dim=32,
            vocab=BYTE_VOCAB,
            max_positions=1024,
            activation="gelu_new",
            norm_eps=1e-5,
            tied_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        ),
    )
}


def load_model_spec(name_or_dir: str, dtype: Dtype = "float32") -> ModelSpec:
    """A preset, or the backbone of a Hugging Face directory.

    Args:
        name_or_dir: Name of a preset, or a directory with ``config.json`` and weights.
        dtype: Of weights and activations.

    Raises:
        UserError: Neither a preset nor such a directory, or an architecture that we do not execute.
    """
    if name_or_dir in PRESETS:
        return PRESETS[name_or_dir].model_copy(update={"dtype": dtype})
    folder = Path(name_or_dir).expanduser()
    if not folder.is_dir():
        raise unknown_name("model preset or directory", name_or_dir, PRESETS)
    return spec_from_hf(folder, dtype)


def spec_from_hf(folder: Path, dtype: Dtype = "float32") -> ModelSpec:
    """Read ``config.json`` of a LlamaForCausalLM or GPT2LMHeadModel directory.

    Raises:
        SpecError: The file is missing, or asks for something that we do not execute exactly.
    """
    where = folder / "config.json"
    if not where.is_file():
        raise SpecError("model", str(folder), "a directory with config.json")
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415  # seconds to import
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(str(where), "unreadable", f"a Hugging Face configuration ({reason})") from error
    try:
        if config.model_type == "llama":
            return _llama_spec(config, folder, dtype)
        if config.model_type == "gpt2":
            return _gpt2_spec(config, folder, dtype)
    except ValidationError as error:
        raise spec_error_from(error, str(where)) from error
    raise SpecError(f"{where}: model_type", config.model_type, "llama or gpt2")


def _llama_spec(config: object, folder: Path, dtype: Dtype) -> ModelSpec:
    c = config.to_dict()  # type: ignore[attr-defined]
    rope = c["rope_parameters"]
    if rope["rope_type"] not in {"default", "linear", "llama3"}:
        expected = "default, linear or llama3: tables that do not change with the length"
        raise SpecError(f"{folder}/config.json: rope_parameters.rope_type", rope["rope_type"], expected)
    return ModelSpec(
        name=folder.resolve().name,
        family="llama",
        source=str(folder.resolve()),
        layers=c["num_hidden_layers"],
        hidden=c["hidden_size"],
        ffn=c["intermediate_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
        vocab=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        activation=c["hidden_act"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        attention_bias=c["attention_bias"],
        mlp_bias=c["mlp_bias"],
        tied_embeddings=c["tie_word_embeddings"],
        dtype=dtype,
    )


def _gpt2_spec(config: object, folder: Path, dtype: Dtype) -> ModelSpec:
    c = config.to_dict()  # type: ignore[attr-defined]
    plain = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    for field, expected in plain.items():
        if c[field] != expected:
            raise SpecError(f"{folder}/config.json: {field}", c[field], str(expected))
    return ModelSpec(
        name=folder.resolve().name,
        family="gpt2",
        source=str(folder.resolve()),
        layers=c["n_layer"],
        hidden=c["n_embd"],
        ffn=c["n_inner"] or 4 * c["n_embd"],
        heads=c["n_head"],
        kv_heads=c["n_head"],
        head_dim=c["n_embd"] // c["n_head"],
        vocab=c["vocab_size"],
        max_positions=c["n_positions"],
        activation=c["activation_function"],
        norm_eps=c["layer_norm_epsilon"],
        tied_embeddings=c["tie_word_embeddings"],
        attention_bias=True,
        mlp_bias=True,
        dtype=dtype,
    )
