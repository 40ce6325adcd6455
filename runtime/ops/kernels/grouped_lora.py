"""LoRA of all tasks on one linear: a launch per phase, whatever the number of tasks, ranks and scales.

    shrink   down = scale * x A^T     and  scale * grad B    per tile of tokens and ranks, K in fixed parts
    expand   y   += down B^T          and  dx += ddown A     per tile of tokens and columns
    outer    dA   = ddown^T x         and  dB  = grad^T down per tile of a weight

Dropout is inside of them: masks follow from the tokens' states, so each kernel computes those of its tile.

Weights stay where their optimizers keep them, one by one: the kernels read their addresses from a table. A
packed copy would have to be renewed after every optimizer step of every task. Which program does what comes
from tables as well (:mod:`runtime.ops.kernels.tables`).

A sum always has the same order: each element of a result is computed by one program, nothing is added
atomically, and K is cut at fixed places. So runs repeat bitwise, and a task's update is bitwise the same
whoever shares the launch. Products are those of the factors' dtype (float32 as three tf32 products, which
keeps about 21 of 24 bits), summed in float32; activations are rounded once, when they are written.

The plain PyTorch path, :mod:`runtime.peft.lora`, is the reference; the tests compare both with float64.
"""

# T tokens, I features in, O features out, R rank, n packed elements

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.ops.dropout import Dropout
from runtime.ops.kernels.lora_kernels import expand, outer, shrink, sum_parts
from runtime.ops.kernels.tables import (
    TILE_RANK,
    TILE_TOKENS,
    Layout,
    Piece,
    Side,
    build_drops,
    build_layout,
    build_pointers,
)

SPLIT_K = 1024
"""Columns that one program sums up: with 512 tokens of hidden size 4096 there would otherwise be 8 programs.
Not a function of the number of programs, so that a task's sums do not depend on its neighbours."""

_FACTOR_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Masks:
    """Dropout of pieces of a stream."""

    keys_T: Tensor
    """States of the tokens, see :mod:`runtime.ops.dropout`."""
    dropouts: tuple[Dropout | None, ...]
    """Dropout of each piece; None where it has none."""


def add_updates_(
    y_TO: Tensor,
    x_TI: Tensor,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    masks: Masks | None = None,
) -> Tensor:
    """Add the update of every piece to its tokens and outputs, in place.

    Args:
        y_TO: Output so far.
        x_TI: Input; float32, or with factors of the same dtype or float32, bfloat16 or float16.
        pieces: Pieces, none of them empty; those of two are the same or disjoint.
        factors: A ``[R, I]`` and B ``[O, R]`` of each piece in turn; of one dtype.
        masks: Dropout of what A reads, if a piece has any; its scale is in that of the piece.

    Returns:
        ``scale * x A^T`` of all pieces, packed ``[n]`` float32, which the gradients need.

    Raises:
        ValueError: Pieces overlap, or a dtype is none of these.
    """
    factors = _dense(factors)
    layout = _layout(pieces, factors, x_TI)
    with torch.cuda.device_of(x_TI):
        down_n = _launch_shrink(x_TI, layout, layout.inputs, factors[0::2], masks)
        _launch_expand(y_TO, layout.outputs, factors[1::2], down_n)
    return down_n


def add_input_gradients_(
    grad_TO: Tensor,
    dx_TI: Tensor | None,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    masks: Masks | None = None,
) -> Tensor:
    """Add the updates' share to the gradient of the input, in place.

    Args:
        grad_TO: Gradient of the output.
        dx_TI: Gradient of the input so far. None if nobody needs it.
        pieces: Pieces of the forward.
        factors: Factors of the forward.
        masks: Dropout of the forward.

    Returns:
        What :func:`factor_gradients` needs.
    """
    factors = _dense(factors)
    layout = _layout(pieces, factors, grad_TO)
    with torch.cuda.device_of(grad_TO):
        ddown_n = _launch_shrink(grad_TO, layout, layout.outputs, factors[1::2])
        if dx_TI is not None:
            _launch_expand(dx_TI, layout.inputs, factors[0::2], ddown_n, masks)
    return ddown_n


def factor_gradients(
    grad_TO: Tensor,
    x_TI: Tensor,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    down_n: Tensor,
    ddown_n: Tensor,
    masks: Masks | None = None,
) -> list[Tensor]:
    """Gradients of the factors of all pieces, in their order.

    Args:
        grad_TO: Gradient of the output.
        x_TI: Input of the forward.
        pieces: Pieces of the forward.
        factors: Factors of the forward.
        down_n: What :func:`add_updates_` returned.
        ddown_n: What :func:`add_input_gradients_` returned.
        masks: Dropout of the forward.
    """
    factors = _dense(factors)
    layout = _layout(pieces, factors, x_TI)
    grads: list[Tensor] = [factors[0]] * len(factors)
    with torch.cuda.device_of(x_TI):
        grads[0::2] = _launch_outer(x_TI, layout, layout.inputs, factors[0::2], ddown_n, masks)
        grads[1::2] = _launch_outer(grad_TO, layout, layout.outputs, factors[1::2], down_n)
    return grads


def _layout(pieces: Sequence[Piece], factors: Sequence[Tensor], like: Tensor) -> Layout:
    dtypes = {factor.dtype for factor in factors}
    if len(dtypes) > 1 or not dtypes <= {like.dtype, torch.float32}:
        raise ValueError(
            f"factors of {dtypes} for inputs of {like.dtype}: expected one dtype, that or float32"
        )
    ranks = tuple(len(a_RI) for a_RI in factors[0::2])
    return build_layout(tuple(pieces), ranks, factors[0].shape[1], like.device)


def _dense(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors as kernels read them: contiguous, at an address that is a multiple of 16, as parameters are."""
    dense = (factor.contiguous() for factor in factors)
    return [factor if factor.data_ptr() % 16 == 0 else factor.clone() for factor in dense]


def _rows(tensor: Tensor) -> Tensor:
    """Tensor with neighbouring columns, as the kernels expect them; a broadcast gradient has none."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _pointers(weights: Sequence[Tensor]) -> Tensor:
    return build_pointers(tuple(weight.data_ptr() for weight in weights), weights[0].device)


def _constants(side: Side, weights: Sequence[Tensor]) -> dict[str, object]:
    """Operands are rounded to the factors' dtype and multiplied in it; the interpreter lacks bfloat16."""
    rounded = _FACTOR_DTYPES[weights[0].dtype]
    interpreted = not isinstance(shrink, triton.JITFunction)
    return {
        "FACTOR": rounded,
        "OPERAND": tl.float32 if interpreted else rounded,
        "ROW_MAJOR": side.row_major,
        "ALIGNED": side.aligned,
        "TILE_TOKENS": TILE_TOKENS,
        "TILE_RANK": TILE_RANK,
    }


def _dropping(masks: Masks | None, like: Tensor) -> dict[str, object]:
    """Arguments for dropout; without, the tables are never read."""
    if masks is None:
        return {"keys": like, "drops": like, "DROPS": False}
    drops = build_drops(masks.dropouts, like.device)
    return {"keys": masks.keys_T.contiguous(), "drops": drops, "DROPS": True}


def _launch_shrink(
    source: Tensor, layout: Layout, side: Side, weights: Sequence[Tensor], masks: Masks | None = None
) -> Tensor:
    source = _rows(source)
    splits = triton.cdiv(side.width, SPLIT_K)
    parts = torch.empty(splits, layout.downs, dtype=torch.float32, device=source.device)
    shrink[len(layout.tiles), splits](
        source,
        source.stride(0),
        side.pieces,
        layout.scales,
        _pointers(weights),
        layout.tiles,
        parts,
        layout.downs,
        **_dropping(masks, layout.tiles),
        **_constants(side, weights),
        TILE_COLUMNS=64,
        SPLIT_K=SPLIT_K,
        num_warps=4,
        num_stages=3 if masks is None else 1,  # masked inputs take more shared memory
        enable_fp_fusion=True,
    )
    if splits == 1:
        return parts[0]
    total = torch.empty_like(parts[0])
    block = 1024
    sum_parts[(triton.cdiv(layout.downs, block),)](
        parts, total, layout.downs, SPLITS=splits, BLOCK=block, enable_fp_fusion=True
    )
    return total


def _launch_expand(
    target: Tensor, side: Side, weights: Sequence[Tensor], down_n: Tensor, masks: Masks | None = None
) -> None:
    assert target.stride(1) == 1, "it is added to in place, so a dense copy would not do"
    columns = 64
    expand[len(side.sums), triton.cdiv(side.width, columns)](
        target,
        target.stride(0),
        side.pieces,
        _pointers(weights),
        side.members,
        side.sums,
        down_n,
        **_dropping(masks, side.sums),
        **_constants(side, weights),
        TILE_COLUMNS=columns,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _launch_outer(
    source: Tensor,
    layout: Layout,
    side: Side,
    weights: Sequence[Tensor],
    down_n: Tensor,
    masks: Masks | None = None,
) -> list[Tensor]:
    source = _rows(source)
    columns = 64
    packed = torch.empty(side.weights, dtype=weights[0].dtype, device=source.device)
    outer[len(layout.ranks), triton.cdiv(side.width, columns)](
        source,
        source.stride(0),
        side.pieces,
        layout.ranks,
        down_n,
        packed,
        **_dropping(masks, layout.ranks),
        **_constants(side, weights),
        TILE_COLUMNS=columns,
        num_warps=8,
        num_stages=3 if masks is None else 1,  # as above
        enable_fp_fusion=True,
    )
    parts = packed.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
