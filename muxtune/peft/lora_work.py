"""Operators of LoRA: how much work they do, and the shapes at which they are profiled."""

# i features in, o features out, r rank

from __future__ import annotations

from collections.abc import Iterable, Mapping

from muxtune.model import ModelSpec
from muxtune.operators import GpuWork, OperatorKind, OperatorWork, Phase
from muxtune.operators.kinds import looked_up


def _pair(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """``x A B`` and its addition; backward: both factors' gradients, the input's, and its addition."""
    i, o, r, tokens = dims
    flops, weights = 2.0 * tokens * r * (i + o), r * (i + o)
    if phase == "fwd":
        return OperatorWork(flops, model.dtype_bytes * (weights + tokens * (i + 2 * r + 2 * o)), 4)
    return OperatorWork(2 * flops, model.dtype_bytes * (3 * weights + tokens * (3 * i + 4 * r + 2 * o)), 8)


def _pair_grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Ranks at every linear; an adapter sees one task's tokens, rarely more than a thousand."""
    tokens = (16, 64, 256, 1024, 4096) if quick else (16, 64, 128, 256, 512, 1024, 4096)
    ranks = (1, 8, 64) if quick else (1, 4, 8, 16, 64)
    for i, o in _widths(model):
        for r in sorted({min(r, i, o) for r in ranks}):
            for n in tokens:
                yield i, o, r, n


def _magnitude(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Bias off, scaled, bias on, joined to the stream; backward: both gradients, of which one is a sum."""
    o, tokens = dims
    elements = float(o * tokens)
    passes, launches = (8, 7) if phase == "fwd" else (7, 6)
    return OperatorWork(3.0 * elements, model.dtype_bytes * passes * elements, launches)


def _bias(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Added and joined to the stream; backward: the gradient is summed over the tokens."""
    o, tokens = dims
    elements = float(o * tokens)
    passes, launches = (4, 4) if phase == "fwd" else (2, 3)
    return OperatorWork(elements, model.dtype_bytes * passes * elements, launches)


def _output_grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    for o in sorted({linear.out_features for linear in model.linears}):
        for n in (16, 256, 4096) if quick else (16, 64, 256, 1024, 4096):
            yield o, n


def _dropped_dora(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """The frozen product of the dropped input, and a pair whose sum with it is scaled; masking apart."""
    i, o, _, tokens = dims
    flops, bytes_, launches = _pair(dims, phase, model)
    passes = 5 if phase == "fwd" else 7
    frozen = i * o + tokens * (i + passes * o)
    return OperatorWork(flops + 2.0 * i * o * tokens, bytes_ + model.dtype_bytes * frozen, launches + 5)


def _dropped_dora_gpu(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> GpuWork:
    i, o, r, t = dims
    if phase == "fwd":
        return GpuWork(((t, o, i), (t, r, i), (t, o, r)), 20.0 * t * o, 4)
    return GpuWork(((t, i, o), (t, r, o), (t, i, r), (r, i, t), (o, r, t)), 28.0 * t * o, 6)


def _dropped_dora_grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    for i, o in _widths(model):
        for r in sorted({min(r, i, o) for r in ((8,) if quick else (1, 8, 64))}):
            for n in (16, 256, 4096) if quick else (16, 64, 256, 1024, 4096):
                yield i, o, r, n


def _widths(model: ModelSpec) -> list[tuple[int, int]]:
    return sorted({(linear.in_features, linear.out_features) for linear in model.linears})


KINDS: Mapping[str, OperatorKind] = {
    "lora": OperatorKind(
        dims=("in_features", "out_features", "r", "tokens"),
        work=_pair,
        grid=_pair_grid,
        split=looked_up(2),
        fitted="adapter",
        samples=((4096, 4096, 8, 512), (4096, 4096, 64, 512)),
        mixed=2,
        mixed_sizes=(16, 64),
    ),
    "lora_magnitude": OperatorKind(
        dims=("out_features", "tokens"),
        work=_magnitude,
        grid=_output_grid,
        fitted="adapter",
        samples=((4096, 512),),
    ),
    "lora_dropped_dora": OperatorKind(
        dims=("in_features", "out_features", "r", "tokens"),
        work=_dropped_dora,
        grid=_dropped_dora_grid,
        split=looked_up(2),
        gpu=_dropped_dora_gpu,
        fitted="adapter",
        samples=((4096, 4096, 8, 512),),
    ),
    "lora_bias": OperatorKind(
        dims=("out_features", "tokens"),
        work=_bias,
        grid=_output_grid,
        fitted="adapter",
        samples=((4096, 512),),
    ),
}
"""Kinds by name.

lora               one task's pair on one linear
lora_magnitude     DoRA's scaling of one linear's outputs
lora_dropped_dora  with dropout: pair, frozen product of the dropped input, and their scaling
lora_bias          a trained bias of one linear
"""
