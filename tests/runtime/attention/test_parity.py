"""Every backend against the masked reference, and that against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.batches import Segment
from runtime.attention import BACKENDS, build_attention_plan, causal_attention
from tests.runtime.attention.stand_ins import let_every_backend_run
from tests.runtime.attention.streams import (
    TOLERANCE,
    attention_definition,
    place,
    rope_tables,
    run,
    run_backend,
)
from tests.sampling import examples

EVERYWHERE = ("grouped", "loop")
OTHERS = sorted(BACKENDS.keys() - {"masked"})
BF16 = 0.03
"""Of results of about 1: half a unit in the last place of bfloat16 is 0.002, and rotated keys, probabilities
and outputs are rounded to it at different moments."""

STREAMS = (
    ([5, 5, 5], [0, 0, 0]),  # the stream is its rows
    ([5, 5, 5], [0, 0, 2]),  # rows together, then holes
    ([1, 100, 99, 80, 33, 1, 2, 64], [0] * 8),
    ([1, 30, 7, 7, 29], [2, 0, 1, 3, 0]),
    ([1], [0]),
)
HEADS = ((4, 4), (4, 2), (6, 1))


@pytest.fixture
def _stand_ins(monkeypatch):
    let_every_backend_run(monkeypatch)


def stream_of(tokens, heads, kv_heads, dtype, width=8):
    torch.manual_seed(0)
    return torch.randn(tokens, (heads + 2 * kv_heads) * width, dtype=dtype)


def check(name, segments, tokens, heads, kv_heads, dtype, *, rope=True, tolerance=None):
    qkv = stream_of(tokens, heads, kv_heads, dtype)
    tables = rope_tables(dtype) if rope else None
    actual = run_backend(name, qkv, segments, heads, kv_heads, tables)
    if name == "masked":
        expected = run(attention_definition, qkv, segments, heads, kv_heads, tables)
    else:
        expected = run_backend("masked", qkv, segments, heads, kv_heads, tables)
    tolerance = tolerance or TOLERANCE[dtype]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rope", [True, False], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("lengths", "gaps"), STREAMS)
def test_the_reference_is_the_definition(dtype, heads, kv_heads, rope, lengths, gaps):
    check("masked", *place(lengths, gaps), heads, kv_heads, dtype, rope=rope)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rope", [True, False], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("lengths", "gaps"), STREAMS)
def test_backends_of_every_device_equal_the_reference(name, dtype, heads, kv_heads, rope, lengths, gaps):
    check(name, *place(lengths, gaps), heads, kv_heads, dtype, rope=rope)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", ["varlen", "flex"])
@pytest.mark.parametrize(("heads", "kv_heads", "rope"), [(4, 2, True), (4, 4, False)])
@pytest.mark.parametrize(("lengths", "gaps"), [STREAMS[0], STREAMS[2], STREAMS[3]])
def test_what_surrounds_the_cuda_kernels_equals_the_reference(name, heads, kv_heads, rope, lengths, gaps):
    check(name, *place(lengths, gaps), heads, kv_heads, torch.float64, rope=rope)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", OTHERS)
def test_bfloat16_is_as_near_as_its_rounding(name):
    check(name, *place([1, 30, 7, 64], [2, 0, 1, 3]), 4, 2, torch.bfloat16, tolerance=BF16)


@pytest.mark.parametrize("name", EVERYWHERE)
@settings(max_examples=examples(25))
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 5)), min_size=1, max_size=12))
def test_equals_the_reference_for_any_lengths_and_gaps(name, sequences):
    check(name, *place(*zip(*sequences, strict=True)), 4, 2, torch.float64)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", OTHERS)
def test_padded_rows_equal_the_reference(name):
    check(name, *place([5, 9, 3], [0, 0, 0], rows=10), 4, 2, torch.float64)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", OTHERS)
def test_a_sequence_in_parts_that_lie_apart_is_one(name):
    """Chunks of a sequence need not be neighbours in the stream."""
    segments = [Segment(0, 0, 0, 8, 8, 0, 5), Segment(0, 1, 8, 6, 6), Segment(0, 0, 16, 5, 5, 8, 0)]
    check(name, segments, 21, 4, 2, torch.float64)


def neighbours_of_a_nan(name):
    """Results and gradients of sequences beside one of NaNs, with and without it."""
    segments, tokens = place([30, 28, 25], [0, 1, 2])
    qkv = stream_of(tokens, 4, 4, torch.float64)
    clean = run_backend(name, qkv, segments, 4, 4, rope_tables(torch.float64))
    first, second, third = (slice(s.start, s.start + s.length) for s in segments)
    qkv[second] = float("nan")
    qkv[second.start - 1] = float("nan")  # belongs to nobody
    dirty = run_backend(name, qkv, segments, 4, 4, rope_tables(torch.float64))
    for a, b in zip(clean, dirty, strict=True):
        for sequence in (first, third):
            yield a[sequence], b[sequence]
        assert (b[second.start - 1] == 0).all() or not BACKENDS[name].isolates


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_isolates_keeps_a_nan_in_its_sequence_and_no_other_does(name):
    apart = all(torch.equal(a, b) for a, b in neighbours_of_a_nan(name))
    assert apart == BACKENDS[name].isolates


@pytest.mark.parametrize("name", BACKENDS)
def test_a_micro_batch_without_sequences_gives_zeros(name):
    qkv = torch.randn(4, 24, requires_grad=True)
    plan = build_attention_plan([], 4, backend=name)
    assert (causal_attention(qkv, plan, 1, 1, None) == torch.zeros(4, 8)).all()
