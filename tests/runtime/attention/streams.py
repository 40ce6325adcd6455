"""Streams of sequences, and attention by its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muxtune.batches import Segment, sequence_rows
from runtime.attention import RopeTables, build_attention_plan, causal_attention
from runtime.attention.backend import row_tokens

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # softmax of sums of up to 100 terms in another order


def rope_tables(dtype, positions=128, width=8):
    angles = torch.arange(positions)[:, None] / 10 ** (torch.arange(width // 2) / 4)
    angles = torch.cat((angles, angles), -1).to(dtype)
    return RopeTables.build(angles.cos(), angles.sin())


def place(lengths, gaps, rows=None):
    """Sequences one behind the other with gaps before, between and behind them; and the stream's length."""
    segments, start = [], 0
    for i, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
        start += gap
        segments.append(Segment(0, i, start, length, rows or length))
        start += rows or length
    return segments, start + gaps[-1]


def run(function, qkv, *args):
    """Result and gradient of its input, for a fixed gradient of the result."""
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, *args)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    return out, grad


def run_backend(name, qkv, segments, heads, kv_heads, rope):
    plan = build_attention_plan(segments, len(qkv), backend=name)
    return run(causal_attention, qkv, plan, heads, kv_heads, rope)


def attention_definition(
    qkv_TF: Tensor, segments: Sequence[Segment], heads: int, kv_heads: int, rope: RopeTables | None
) -> Tensor:
    """Sequence by sequence, explicit softmax; sequences lie in this micro-batch from start to end."""
    width = qkv_TF.shape[1] // (heads + 2 * kv_heads)
    out = qkv_TF.new_zeros(len(qkv_TF), heads * width)
    for row in sequence_rows(segments):
        tokens = torch.from_numpy(row_tokens(row)).to(qkv_TF.device)
        x = qkv_TF[tokens].view(len(tokens), heads + 2 * kv_heads, width)
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
        if rope is not None:
            cos, sin = rope.cos[: len(tokens)], rope.sin[: len(tokens)]
            q, k = (y * cos + y.roll(width // 2, dims=-1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * width**-0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        out = out.index_put((tokens,), torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    return out
