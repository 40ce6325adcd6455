from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.alignment import Segment
from runtime.attention import RopeTables, attention_reference, build_attention_plan, causal_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # softmax of sums of up to 100 terms in another order


def rope_tables(dtype, positions=128, width=8):
    angles = torch.arange(positions)[:, None] / 10 ** (torch.arange(width // 2) / 4)
    angles = torch.cat((angles, angles), -1).to(dtype)
    return RopeTables.build(angles.cos(), angles.sin())


def place(lengths, gaps, rows=None):
    segments, start = [], 0
    for i, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
        start += gap
        segments.append(Segment(0, i, start, length, rows or length))
        start += rows or length
    return segments, start + gaps[-1]


def run(function, qkv, *args):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv, *args)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    return out, grad


def check(segments, tokens, heads, kv_heads, dtype, *, rope=True):
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * 8, dtype=dtype)
    tables = rope_tables(dtype) if rope else None
    actual = run(causal_attention, qkv, build_attention_plan(segments, tokens), heads, kv_heads, tables)
    expected = run(attention_reference, qkv, segments, heads, kv_heads, tables)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    ("lengths", "gaps"),
    [
        ([5, 5, 5], [0, 0, 0]),  # the stream is its rows
        ([5, 5, 5], [0, 0, 2]),  # rows together, then holes
        ([1, 100, 99, 80, 33, 1, 2, 64], [0] * 8),
        ([1, 30, 7, 7, 29], [2, 0, 1, 3, 0]),
        ([1], [0]),
    ],
)
def test_equals_the_reference_forward_and_backward(dtype, heads, kv_heads, rope, lengths, gaps):
    check(*place(lengths, gaps), heads, kv_heads, dtype, rope=rope)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 5)), min_size=1, max_size=12))
def test_equals_the_reference_for_any_lengths_and_gaps(sequences):
    check(*place(*zip(*sequences, strict=True)), 4, 2, torch.float64)


def test_padded_rows_equal_the_reference():
    check(*place([5, 9, 3], [0, 0, 0], rows=10), 4, 2, torch.float64)


def test_nothing_leaks_between_sequences_of_a_call_or_from_padding():
    lengths, gaps = [30, 28, 25], [0, 1, 2]
    segments, tokens = place(lengths, gaps)
    plan = build_attention_plan(segments, tokens)
    assert len(plan.groups) == 1
    torch.manual_seed(0)
    qkv = torch.randn(tokens, 4 * 3 * 8, dtype=torch.float64)
    clean = run(causal_attention, qkv, plan, 4, 4, rope_tables(torch.float64))
    first, second, third = (slice(s.start, s.start + s.length) for s in segments)
    qkv[second] = float("nan")
    qkv[second.start - 1] = float("nan")  # belongs to nobody
    dirty = run(causal_attention, qkv, plan, 4, 4, rope_tables(torch.float64))
    for a, b in zip(clean, dirty, strict=True):
        for sequence in (first, third):
            assert torch.equal(a[sequence], b[sequence])
        assert (b[second.start - 1] == 0).all()


def test_a_micro_batch_without_sequences_gives_zeros():
    qkv = torch.randn(4, 24, requires_grad=True)
    assert (causal_attention(qkv, build_attention_plan([], 4), 1, 1, None) == torch.zeros(4, 8)).all()
