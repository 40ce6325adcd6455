from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from muxtune.batches import Span
from muxtune.operators import OperatorShape
from muxtune.peft import Attachment, Site
from runtime.backbone.linear import SharedLinear
from runtime.ops.deferred import SideWork, collecting
from runtime.ops.dropout import Dropout
from runtime.peft.lora import LoraPair, lora_linear
from runtime.peft.lora_reference import lora_linear_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest element


def random_case(dtype, tokens, ranks, features=(48, 40), rates=()):
    """Tasks of equal spans, one pair per task over all outputs; rank 0 is a task without an adapter.

    ``rates`` are those of the first tasks' dropout.
    """
    torch.manual_seed(0)
    width, outputs = features
    x = torch.randn(tokens * len(ranks), width, dtype=dtype)
    weight, bias = torch.randn(outputs, width, dtype=dtype), torch.randn(outputs, dtype=dtype)
    spans = [Span(i, i * tokens, (i + 1) * tokens) for i in range(len(ranks))]
    adapters = [
        [
            LoraPair(
                torch.randn(r, width, dtype=dtype).requires_grad_(),
                torch.randn(outputs, r, dtype=dtype).requires_grad_(),
                0.5 + i,
                (0, outputs),
                Dropout(rates[i], 40 + i) if i < len(rates) and rates[i] else None,
            )
        ]
        if r
        else []
        for i, r in enumerate(ranks)
    ]
    return x, weight, bias, spans, adapters


def keys_of(x):
    return torch.arange(len(x), dtype=torch.int64) * 982_451_653


def run(function, x, weight, bias, spans, adapters):
    x = x.clone().requires_grad_()
    factors = [t for pairs in adapters for pair in pairs for t in (pair.a_RI, pair.b_OR)]
    y = function(x, weight, bias, spans, adapters, dropout_keys_T=keys_of(x))
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [x, *factors], torch.randn_like(y))]


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "ranks", "features"),
    [(7, (1, 3, 0, 8), (48, 40)), (5, (0,), (8, 8)), (400, (64, 8), (256, 688)), (300, (33,), (688, 256))],
)
def test_output_and_all_gradients_equal_the_reference(dtype, with_bias, tokens, ranks, features):
    x, weight, bias, spans, adapters = random_case(dtype, tokens, ranks, features)
    case = (x, weight, bias if with_bias else None, spans, adapters)
    # Both sum in another order; float32 carries 24 bits through sums of up to 688 terms.
    assert_close(run(lora_linear, *case), run(lora_linear_reference, *case), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "ranks", "rates", "features"),
    [
        (7, (1, 3, 0, 8), (0.1, 0.0, 0.3, 0.5), (48, 40)),
        (5, (4,), (0.9,), (9, 8)),
        (400, (64, 8), (0.0, 0.1), (256, 688)),
    ],
)
def test_with_dropout_output_and_all_gradients_equal_the_reference(dtype, tokens, ranks, rates, features):
    case = random_case(dtype, tokens, ranks, features, rates)
    assert_close(run(lora_linear, *case), run(lora_linear_reference, *case), TOLERANCE[dtype])
    without = random_case(dtype, tokens, ranks, features)
    assert not torch.allclose(run(lora_linear, *case)[0], run(lora_linear, *without)[0])


def test_numeric_gradients_through_dropout():
    x, weight, bias, spans, adapters = random_case(torch.float64, 3, (2, 3, 1), (6, 5), (0.4, 0.0, 0.5))
    factors = [t for pairs in adapters for pair in pairs for t in (pair.a_RI, pair.b_OR)]

    def function(x, *_):
        return lora_linear(x, weight, bias, spans, adapters, dropout_keys_T=keys_of(x))

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *factors))


def test_dropout_keeps_no_mask_and_costs_nothing_where_there_is_none():
    def kept(rates):
        x, weight, bias, spans, adapters = random_case(torch.float32, 6, (4, 2), rates=rates)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            lora_linear(x.requires_grad_(), weight, bias, spans, adapters, dropout_keys_T=keys_of(x))
        return sum(sizes)

    assert kept((0.1, 0.1)) == kept(()) + 12 * 8  # the states of its tokens


def test_numeric_gradients():
    x, weight, bias, spans, adapters = random_case(torch.float64, 3, (2, 0, 1), (4, 5))
    factors = [t for pairs in adapters for pair in pairs for t in (pair.a_RI, pair.b_OR)]

    def function(x, *_):
        return lora_linear(x, weight, bias, spans, adapters)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *factors))


def test_a_task_is_bitwise_untouched_by_what_its_neighbours_hold():
    x, weight, bias, spans, adapters = random_case(torch.float64, 6, (4, 2))
    before = run(lora_linear, x, weight, bias, spans, adapters)
    with torch.no_grad():
        adapters[1][0].a_RI.fill_(float("nan"))
        x[spans[1].start :] = float("inf")
    after = run(lora_linear, x, weight, bias, spans, adapters)
    for a, b in zip(before[:2], after[:2], strict=True):  # output and input gradient
        assert torch.equal(a[: spans[0].stop], b[: spans[0].stop])
    assert torch.equal(before[2], after[2])  # A of the first task
    assert torch.equal(before[3], after[3])  # B of the first task


def test_input_is_saved_only_if_an_adapter_needs_it():
    for ranks, saved in (((4,), True), ((0,), False)):
        x, weight, bias, spans, adapters = random_case(torch.float32, 6, ranks)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            lora_linear(x.requires_grad_(), weight, bias, spans, adapters)
        assert any(t.data_ptr() == x.data_ptr() for t in kept) == saved


def test_no_input_gradient_is_computed_for_the_first_layer():
    x, weight, bias, spans, adapters = random_case(torch.float32, 6, (4,))
    y = lora_linear(x, weight, bias, spans, adapters)
    y.sum().backward()
    assert x.grad is None
    assert adapters[0][0].a_RI.grad is not None


def at_linear(path: str) -> Attachment:
    site = Site("linear", path, 0, 0, 16, 4)
    return Attachment(site=site, tensors=(), adapter=OperatorShape("lora", (16, 4, 2)))


def test_shared_linear_equals_its_linears_one_by_one():
    torch.manual_seed(0)
    weights = {name: torch.randn(o, 16, dtype=torch.float64) for name, o in (("q", 8), ("k", 4), ("v", 4))}
    shared = SharedLinear(weights)
    x, spans = torch.randn(10, 16, dtype=torch.float64), [Span(0, 0, 6), Span(1, 6, 10)]
    pairs = {}
    for task_id, names in (("a", ("q", "v")), ("b", ("k",))):
        for name in names:
            a = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
            b = torch.randn(len(weights[name]), 2, dtype=torch.float64, requires_grad=True)
            pairs[task_id, name] = LoraPair(a, b, 0.7, (0, len(weights[name])))
            shared.attach(task_id, "lora", at_linear(name), LoraPair(a, b, 0.7, shared.columns[name]))
    batch = SimpleNamespace(spans=spans, task_ids=("a", "b"), dropout_keys_T=None)
    expected = torch.cat(
        [
            lora_linear_reference(
                x, weight, None, spans, [[pairs[t, name]] if (t, name) in pairs else [] for t in ("a", "b")]
            )
            for name, weight in weights.items()
        ],
        dim=1,
    )
    torch.testing.assert_close(shared.forward(x, batch), expected, rtol=1e-12, atol=1e-12)


def test_dropout_beside_a_bfloat16_backbone_equals_pefts_order_of_operations():
    x, weight, bias, spans, adapters = random_case(torch.bfloat16, 6, (4,), rates=(0.25,))
    given = adapters[0][0]
    a, b = (t.float().detach().requires_grad_() for t in (given.a_RI, given.b_OR))
    y = lora_linear(
        x.requires_grad_(),
        weight,
        bias,
        spans,
        [[LoraPair(a, b, 0.5, (0, 40), given.dropout)]],
        dropout_keys_T=keys_of(x),
    )
    mask = given.dropout.keep(keys_of(x), 48)
    base = torch.nn.functional.linear(x, weight, bias)
    expected = (base + (x.float() * mask / 0.75 @ a.T @ b.T) * 0.5).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=0.008, atol=0.01)  # one unit in the last place of bfloat16
    grads = torch.autograd.grad(y.float().sum(), [x, a, b])
    expected_grads = torch.autograd.grad(expected.float().sum(), [x, a, b])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=0.02, atol=0.02)


def test_adapters_of_a_bfloat16_backbone_compute_in_float32_as_peft_does():
    x, weight, bias, spans, adapters = random_case(torch.bfloat16, 6, (4,))
    pair = LoraPair(
        *(t.float().detach().requires_grad_() for t in (adapters[0][0].a_RI, adapters[0][0].b_OR)),
        0.5,
        (0, 40),
    )
    x.requires_grad_()
    y = lora_linear(x, weight, bias, spans, [[pair]])
    base = torch.nn.functional.linear(x, weight, bias)
    expected = (base + (x.float() @ pair.a_RI.T @ pair.b_OR.T) * 0.5).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=0.008, atol=0.01)  # one unit in the last place of bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert pair.a_RI.grad.dtype == torch.float32


def test_gradients_of_factors_that_are_put_off_are_those_of_autograd():
    def trained(put_off: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        a_RI, b_OR = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 8), (6, 3)))
        weight_OI = torch.randn(6, 8)
        for _ in range(2):  # micro-batches add up
            x_TI = torch.randn(5, 8, requires_grad=True)
            y_TO = lora_linear(x_TI, weight_OI, None, [Span(0, 0, 5)], [[LoraPair(a_RI, b_OR, 2.0, (0, 6))]])
            side = SideWork()
            with collecting(side) if put_off else nullcontext():
                y_TO.square().sum().backward()
            assert side.waits() == put_off
            side.run()
        return [a_RI.grad, b_OR.grad]

    for ours, expected in zip(trained(put_off=True), trained(put_off=False), strict=True):
        assert torch.equal(ours, expected)
        # A fused optimizer reads both as they lie in memory.
        assert ours.stride() == expected.stride()
        assert not ours.requires_grad
