"""Collectives of tensor-parallel ranks inside of a stage's forward and backward (arXiv 1909.08053).

Between two linears, the first cut by its outputs and the second by its inputs, every rank works on its own
features. Before them all ranks have the same tensor, whose gradient is the sum of theirs (:func:`shared`);
after them every rank has a term of a sum (:func:`summed`). All functions return their input if a rank has its
stage for itself.
"""

# T tokens, D hidden size, N target tokens, W rank's rows of the vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from runtime.distributed.sharding import Shard
from runtime.distributed.teams import Team
from runtime.ops.autograd import Context


def shared(x_TD: Tensor, shard: Shard) -> Tensor:
    """What all ranks have alike and each reads for its own features; the gradients are summed."""
    if shard.team is None:
        return x_TD
    result: Tensor = _Shared.apply(x_TD, shard.team)
    return result


def summed(x_TD: Tensor, shard: Shard) -> Tensor:
    """Sum of what the ranks have, in place; the gradient is that of each term."""
    if shard.team is None:
        return x_TD
    result: Tensor = _Summed.apply(x_TD, shard.team)
    return result


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor, None]:
        # A copy, because a gradient that comes in may be somebody else's too.
        total_TD = grad_TD.clone(memory_format=torch.contiguous_format)
        ctx.team.sum_(total_TD)
        return total_TD, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, team: Team) -> Tensor:
        ctx.mark_dirty(x_TD)
        team.sum_(x_TD)
        return x_TD

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD, None


def select_rows(tokens_T: Tensor, rows_WD: Tensor, first: int, shard: Shard) -> Tensor:
    """Rows of a table that is cut by its rows, ``[T, D]`` on every rank; the table is frozen.

    Args:
        tokens_T: Row of the whole table for each token.
        rows_WD: The rank's rows.
        first: Number of the first of these in the whole table.
        shard: Place of the rank among those that share the stage.
    """
    if shard.team is None:
        return rows_WD.index_select(0, tokens_T)
    held_T, elsewhere_T = _held_rows(tokens_T, first, len(rows_WD))
    hidden_TD = rows_WD.index_select(0, held_T).masked_fill_(elsewhere_T[:, None], 0.0)
    shard.team.sum_(hidden_TD)
    return hidden_TD


def split_nll(logits_NW: Tensor, ids_N: Tensor, first: int, team: Team) -> Tensor:
    """Negative log-likelihood of each target, ``[N]``, from logits that are cut by the vocabulary.

    Args:
        logits_NW: Logits of the rank's part of the vocabulary.
        ids_N: Targets, any of the vocabulary.
        first: Id of the rank's first token.
        team: All ranks.
    """
    result: Tensor = _SplitNll.apply(logits_NW, ids_N, first, team)
    return result


class _SplitNll(torch.autograd.Function):
    """``log sum exp(logits) - logits[id]``, three numbers per target between the ranks."""

    @staticmethod
    def forward(ctx: Context, logits_NW: Tensor, ids_N: Tensor, first: int, team: Team) -> Tensor:
        held_N, elsewhere_N = _held_rows(ids_N, first, logits_NW.shape[1])
        largest_N = logits_NW.amax(-1)
        team.max_(largest_N)
        below_NW = logits_NW - largest_N[:, None]
        target_N = below_NW.gather(1, held_N[:, None])[:, 0].masked_fill_(elsewhere_N, 0.0)
        exp_NW = below_NW.exp_()
        sums_2N = torch.stack((exp_NW.sum(-1), target_N))
        team.sum_(sums_2N)
        total_N, target_N = sums_2N.unbind()
        ctx.save_for_backward(exp_NW.div_(total_N[:, None]), held_N, elsewhere_N)
        return total_N.log() - target_N

    @staticmethod
    def backward(ctx: Context, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        probability_NW, held_N, elsewhere_N = ctx.saved_tensors
        grad_NW = probability_NW * grad_N[:, None]
        grad_NW.scatter_add_(1, held_N[:, None], -grad_N.masked_fill(elsewhere_N, 0.0)[:, None])
        return grad_NW, None, None, None


def _held_rows(rows: Tensor, first: int, held: int) -> tuple[Tensor, Tensor]:
    """Positions among a rank's rows, any where it does not hold a row, and where that is so."""
    own = rows - first
    return own.clamp(0, held - 1), (own < 0) | (own >= held)
