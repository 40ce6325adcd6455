"""Attention over keys and values from earlier micro-batches, against that of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muxtune.batches import HTaskShape, MicrobatchLayout, Segment, layout_step
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from runtime.attention import BACKENDS, build_attention_plan, causal_attention
from runtime.attention.carried_kv import CarriedKv
from tests.runtime.attention.stand_ins import let_every_backend_run
from tests.runtime.attention.streams import TOLERANCE, attention_definition, rope_tables
from tests.sampling import examples

CHUNK = 16


def layouts_of(lengths: Sequence[Sequence[int]], carry: int) -> list[MicrobatchLayout]:
    """One carry group."""
    tokens = CHUNK * (1 + sum(-(-length // CHUNK) for task in lengths for length in task))
    shape = HTaskShape(alignment="chunk", row_tokens=CHUNK, microbatches=carry, tokens=tokens, carry=carry)
    return layout_step(shape, [np.array(task) for task in lengths])


def whole(lengths: Sequence[Sequence[int]]) -> tuple[list[Segment], int]:
    """All sequences in one stream, each in one piece."""
    segments, start = [], 0
    for task, each in enumerate(lengths):
        for sequence, length in enumerate(each):
            segments.append(Segment(task, sequence, start, length, length))
            start += length
    return segments, start


def places(layout: MicrobatchLayout, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Tokens of a micro-batch's stream, and the same tokens among the whole sequences."""
    start = {(s.task, s.sequence): s.start for s in segments}
    own = [np.arange(s.start, s.start + s.length) for s in layout.segments]
    all_ = [np.arange(s.length) + start[s.task, s.sequence] + s.offset for s in layout.segments]
    nothing = np.zeros(0, dtype=np.int64)
    here, there = (torch.from_numpy(np.concatenate([nothing, *each])) for each in (own, all_))
    return here, there


def two_layers(attend, x: Tensor, weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Attention twice, the second over what the first gives, so that gradients run through both carries."""
    return attend("second", torch.tanh(attend("first", x) @ weight))


def check(
    lengths: Sequence[Sequence[int]],
    carry: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    rope: bool = True,
    dtype: torch.dtype = torch.float64,
    backend: AttentionName = DEFAULT_ATTENTION,
) -> None:
    torch.manual_seed(0)
    features = (heads + 2 * kv_heads) * 8
    tables = rope_tables(dtype, positions=512) if rope else None
    segments, tokens = whole(lengths)
    weight = torch.randn(heads * 8, features, dtype=dtype) / 4
    sent = torch.randn(tokens, heads * 8, dtype=dtype)

    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)

    def attend_whole(_layer: str, qkv: Tensor) -> Tensor:
        return attention_definition(qkv, segments, heads, kv_heads, tables)

    expected = two_layers(attend_whole, x, weight, heads, kv_heads)
    (expected_gradient,) = torch.autograd.grad(expected, x, sent)

    layouts = layouts_of(lengths, carry)
    carried = CarriedKv()
    inputs, outputs, grads = [], [], []
    result = torch.zeros_like(expected)
    for number, layout in enumerate(layouts):
        plan = build_attention_plan(
            layout.segments, layout.tokens, backend=backend, carried=carried, earlier=layouts[:number]
        )

        def attend(layer: str, qkv: Tensor, plan=plan) -> Tensor:
            return causal_attention(qkv, plan, heads, kv_heads, tables, layer)

        own, among_all = places(layout, segments)
        stream = torch.zeros(layout.tokens, features, dtype=dtype)
        stream[own] = x.detach()[among_all]
        inputs.append(stream.requires_grad_())
        outputs.append(two_layers(attend, stream, weight, heads, kv_heads))
        gradient = torch.zeros_like(outputs[-1])
        gradient[own] = sent[among_all]
        grads.append(gradient)
        result[among_all] = outputs[-1].detach()[own]
    for output, gradient in zip(reversed(outputs), reversed(grads), strict=True):
        if output.requires_grad:  # a micro-batch may be empty
            torch.autograd.backward(output, gradient)
    actual_gradient = torch.zeros_like(x)
    for layout, stream in zip(layouts, inputs, strict=True):
        own, among_all = places(layout, segments)
        if stream.grad is not None:
            actual_gradient[among_all] = stream.grad[own]
    tolerance = 10 * TOLERANCE[dtype]  # two layers
    torch.testing.assert_close(result, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("carry", [1, 2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "rope"), [(4, 4, False), (4, 2, True), (6, 1, True)])
def test_a_sequence_of_several_chunks_is_attended_to_as_a_whole(carry, chunks, heads, kv_heads, rope):
    check([[chunks * CHUNK - 3]], carry, heads=heads, kv_heads=kv_heads, rope=rope)


@pytest.mark.parametrize("carry", [1, 2, 4])
def test_single_precision_is_as_near_as_its_rounding(carry):
    check([[5 * CHUNK, 3, 40], [2 * CHUNK + 1, CHUNK, 7]], carry, dtype=torch.float32)


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {DEFAULT_ATTENTION}))
@pytest.mark.parametrize(("carry", "rope"), [(1, True), (2, True), (4, False)])
def test_every_backend_goes_on_with_carried_keys(backend, carry, rope, monkeypatch):
    let_every_backend_run(monkeypatch)
    check([[5 * CHUNK, 3, 40], [2 * CHUNK + 1, CHUNK, 7]], carry, rope=rope, backend=backend)


@settings(max_examples=examples(40))
@given(
    st.lists(st.lists(st.integers(1, 5 * CHUNK), min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]),
)
def test_any_sequences_of_any_tasks(lengths, carry):
    check(lengths, carry)


def test_the_gradient_is_wrong_if_the_group_goes_back_in_forward_order():
    """The comparison does see the carried gradients."""
    layouts = layouts_of([[3 * CHUNK]], 2)
    carried = CarriedKv()
    outputs, inputs = [], []
    for number, layout in enumerate(layouts):
        plan = build_attention_plan(layout.segments, layout.tokens, carried=carried, earlier=layouts[:number])
        torch.manual_seed(number)
        inputs.append(torch.randn(layout.tokens, 64, dtype=torch.float64, requires_grad=True))
        outputs.append(causal_attention(inputs[-1], plan, 4, 2, rope_tables(torch.float64), "layer"))
    sent = [torch.ones_like(output) for output in outputs]
    alone = torch.autograd.grad(outputs[0], inputs[0], sent[0], retain_graph=True)[0]
    torch.autograd.backward(outputs[1], sent[1])
    whole_ = torch.autograd.grad(outputs[0], inputs[0], sent[0])[0]
    assert (whole_ - alone).abs().max() > 1e-3
