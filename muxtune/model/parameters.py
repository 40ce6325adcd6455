"""Tensors of a backbone, under the names and with the shapes that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator

from muxtune.model.spec import Family, ModelSpec

Shape = tuple[int, ...]

EMBEDDING: dict[Family, str] = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
}
HEAD = "lm_head.weight"

_POSITIONS: dict[Family, str] = {
    "gpt2": "transformer.wpe.weight",
    "opt": "model.decoder.embed_positions.weight",
}
_LAYER_NORMS: dict[Family, tuple[str, str]] = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
}
_FINAL_NORM: dict[Family, str] = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
}


def parameter_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every parameter by its name; a tied head is listed beside the embedding."""
    return dict(_parameters(spec))


def base_prefix(family: Family) -> str:
    """What stands before the names of a model with a head, and not before those of one without."""
    return EMBEDDING[family].split(".", 1)[0]


def _parameters(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    yield EMBEDDING[spec.family], (spec.vocab, spec.hidden)
    if spec.learned_positions:
        yield _POSITIONS[spec.family], (spec.max_positions + spec.position_offset, spec.hidden)
    for layer in range(spec.layers):
        path = f"{spec.layer_prefix}.{layer}"
        for norm in _LAYER_NORMS[spec.family]:
            yield from _norm(spec, f"{path}.{norm}")
        for linear in spec.linears:
            shape = (linear.out_features, linear.in_features)
            yield f"{path}.{linear.name}.weight", shape[::-1] if spec.transposed_weights else shape
            if spec.has_bias(linear):
                yield f"{path}.{linear.name}.bias", (linear.out_features,)
    yield from _norm(spec, _FINAL_NORM[spec.family])
    yield HEAD, (spec.vocab, spec.hidden)


def _norm(spec: ModelSpec, path: str) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.weight", (spec.hidden,)
    if not spec.rms_norm:
        yield f"{path}.bias", (spec.hidden,)
