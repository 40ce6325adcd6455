"""How much work an operator is: floating-point operations, bytes moved and kernels started.

The counts are those of a straightforward implementation (see :data:`muxtune.graph.operators.OPERATOR_DIMS`
for what each kind does); they give a latency its shape. What a real implementation does better or worse is
the ratio that :class:`muxtune.costs.profiled.ProfiledCosts` measures on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from muxtune.graph.operators import Operator, Phase
from muxtune.model import ModelSpec


class OperatorWork(NamedTuple):
    """Work of one operator."""

    flops: float
    bytes: float
    launches: float
    """Kernels, or calls of library functions; messages one after the other where ranks communicate."""


def operator_work(op: Operator, phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work of one operator, for every kind but ``stage``, which is composed of the others."""
    return _WORK[op.kind](op.dims, phase, model)


def _linear(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """One GEMM in both phases: the frozen weight has no gradient."""
    i, o, tokens = dims
    return OperatorWork(2.0 * i * o * tokens, model.dtype_bytes * (i * o + tokens * (i + o)), 1)


def _lora(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """``x A B`` and its addition; backward: both factors' gradients, the input's, and its addition."""
    i, o, r, tokens = dims
    flops, weights = 2.0 * tokens * r * (i + o), r * (i + o)
    if phase == "fwd":
        return OperatorWork(flops, model.dtype_bytes * (weights + tokens * (i + 2 * r + 2 * o)), 4)
    return OperatorWork(2 * flops, model.dtype_bytes * (3 * weights + tokens * (3 * i + 4 * r + 2 * o)), 8)


def _dropout(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Mask, and the masked input; backward: both again, and the masked gradient, which is added.

    A mask is one byte per feature, computed from 64-bit numbers, each for four features, in pieces that stay
    in the cache.
    """
    elements = float(dims[0] * dims[1])
    moved = 2 if phase == "fwd" else 7
    return OperatorWork(
        3.0 * elements, (model.dtype_bytes * moved + 3) * elements, 15 if phase == "fwd" else 17
    )


def _attention(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Two causal batched GEMMs forward and five backward; queries, keys, values are moved several times."""
    sequences, length = dims
    pair = 2.0 * sequences * model.heads * model.head_dim * length * (length + 1) / 2
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    out = model.heads * model.head_dim
    moved = model.dtype_bytes * sequences * length * (4 * qkv + 2 * out)
    return OperatorWork(2 * pair, moved, 12) if phase == "fwd" else OperatorWork(5 * pair, 2 * moved, 18)


def _carried_attention(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """A rectangle of earlier keys and a triangle of own ones; earlier keys and values are gathered first."""
    sequences, queries, keys = dims
    flops, moved, launches = _attention((sequences, queries), phase, model)
    earlier = sequences * (keys - queries)
    products, copies = (2, 4) if phase == "fwd" else (5, 8)
    flops += products * 2.0 * earlier * queries * model.heads * model.head_dim
    moved += copies * model.dtype_bytes * earlier * 2 * model.kv_heads * model.head_dim
    return OperatorWork(flops, moved, launches + 4)


def _norm(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Reads input and residual, writes sum and norm; backward reads two gradients and the saved sum."""
    elements = dims[0] * model.hidden
    return OperatorWork(8.0 * elements, model.dtype_bytes * 5 * elements, 4 if phase == "fwd" else 6)


def _activation(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Element by element; a gate doubles what is read and, backward, what is written."""
    elements = dims[0] * model.ffn
    inputs = 2 if model.gated else 1
    moved = inputs + 1 if phase == "fwd" else 2 * inputs + 1
    return OperatorWork(12.0 * elements, model.dtype_bytes * moved * elements, inputs)


def _embedding(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Gathers rows of a table; learned positions add a row of a second one."""
    tables = 2 if model.learned_positions else 1
    return OperatorWork(0.0, model.dtype_bytes * 2 * tables * dims[0] * model.hidden, tables)


def _head(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Norm, one GEMM to the vocabulary and the cross-entropy over it."""
    targets = dims[0]
    elements = model.hidden * model.vocab + targets * (4 * model.hidden + 4 * model.vocab)
    return OperatorWork(2.0 * targets * model.hidden * model.vocab, model.dtype_bytes * elements, 8)


def _optimizer(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """AdamW reads parameter, gradient and both moments and writes three of them back."""
    tensors, parameters = dims
    return OperatorWork(12.0 * parameters, model.dtype_bytes * 7 * parameters, 10 + tensors)


def _feed(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Array operations for each sequence, and as many again for the micro-batch; their bytes are nothing."""
    return OperatorWork(0.0, 64.0 * dims[0], 10.0 + 10.0 * dims[0])


def _p2p(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work of one message."""
    return OperatorWork(0.0, float(dims[0]), 1)


def _ring(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work once around the ring: each rank sends all parts of the tensor but one, a message each."""
    bytes_, ranks = dims
    return OperatorWork(0.0, bytes_ * (ranks - 1) / ranks, ranks - 1)


def _all_reduce(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work twice around the ring: a reduce-scatter, then an all-gather."""
    _, bytes_, launches = _ring(dims, phase, model)
    return OperatorWork(0.0, 2 * bytes_, 2 * launches)


_WORK: dict[str, Callable[[tuple[int, ...], Phase, ModelSpec], OperatorWork]] = {
    "linear": _linear,
    "lora": _lora,
    "dropout": _dropout,
    "attention": _attention,
    "carried_attention": _carried_attention,
    "norm": _norm,
    "activation": _activation,
    "embedding": _embedding,
    "head": _head,
    "optimizer": _optimizer,
    "feed": _feed,
    "message": _p2p,
    "p2p": _p2p,
    "all_reduce": _all_reduce,
    "all_gather": _ring,
    "reduce_scatter": _ring,
}
