"""Tensors of a backbone, under the names and with the shapes that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator

from muxtune.model.families import FAMILIES
from muxtune.model.spec import ModelSpec

Shape = tuple[int, ...]

HEAD = "lm_head.weight"


def parameter_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every parameter by its name; a tied head is listed beside the embedding."""
    return dict(_parameters(spec))


def _parameters(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    family = FAMILIES[spec.family]
    yield family.embedding, (spec.vocab, spec.hidden)
    if family.positions is not None:
        yield family.positions, (spec.max_positions + spec.position_offset, spec.hidden)
    for layer in range(spec.layers):
        path = f"{spec.layer_prefix}.{layer}"
        for norm in family.layer_norms:
            yield from _norm(spec, f"{path}.{norm}")
        for linear in spec.linears:
            shape = (linear.out_features, linear.in_features)
            yield f"{path}.{linear.name}.weight", shape[::-1] if spec.transposed_weights else shape
            if spec.has_bias(linear):
                yield f"{path}.{linear.name}.bias", (linear.out_features,)
    yield from _norm(spec, family.final_norm)
    yield HEAD, (spec.vocab, spec.hidden)


def _norm(spec: ModelSpec, path: str) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.weight", (spec.hidden,)
    if not spec.rms_norm:
        yield f"{path}.bias", (spec.hidden,)
