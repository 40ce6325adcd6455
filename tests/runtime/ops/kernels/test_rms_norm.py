"""The norm's kernels in triton's interpreter, against the reference in float64 and PyTorch's own path."""

from __future__ import annotations

import pytest
import torch

from runtime.ops.elementwise import RmsNorm, add_rms_norm, rms_norm
from runtime.ops.kernels import kernels

EPS = 1e-5
# The interpreter truncates where a GPU rounds to nearest; with bfloat16's 8 bits, 2^-7 per rounding: the sum,
# the normalized tokens and their product with the weight are rounded.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3 * 2**-7}
SHAPES = [(5, 64), (3, 100), (1, 3), (2, 1030)]


def draw(shape, dtype):
    torch.manual_seed(0)
    tokens, features = shape
    weight = torch.randn(features).to(dtype)
    return weight, *((torch.randn(tokens, features) * 3).to(dtype) for _ in range(4))


def run_norm(shape, dtype, mode="triton"):
    """Sum, norm, and gradients: of the norm alone, then of the norm of a sum whose parts are both used."""
    weight, x, update, dtotal, grad = draw(shape, dtype)
    x, update = x.requires_grad_(), update.requires_grad_()
    with kernels(mode):
        alone = rms_norm(x, weight, EPS)
        total, normed = add_rms_norm(x, update, weight, EPS)
    (dx_alone,) = torch.autograd.grad(alone, x, grad)
    dx, dupdate = torch.autograd.grad((total, normed), (x, update), (dtotal, grad))
    return [each.detach() for each in (alone, dx_alone, total, normed, dx, dupdate)]


def run_formula(shape, dtype):
    weight, x, update, dtotal, grad = (each.double() for each in draw(shape, dtype))
    x, update = x.requires_grad_(), update.requires_grad_()

    def norm(value):
        return value * (value.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight

    alone = norm(x)
    total = x + update
    normed = norm(total)
    (dx_alone,) = torch.autograd.grad(alone, x, grad)
    dx, dupdate = torch.autograd.grad((total, normed), (x, update), (dtotal, grad))
    return [each.detach() for each in (alone, dx_alone, total, normed, dx, dupdate)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gradients_equal_the_formula_in_float64(interpreted, shape, dtype):
    actual, expected = interpreted(run_norm, shape, dtype), run_formula(shape, dtype)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= TOLERANCES[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernels_and_plain_path_agree(interpreted, dtype):
    actual, plain = interpreted(run_norm, (4, 96), dtype), run_norm((4, 96), dtype, "torch")
    for a, b in zip(actual, plain, strict=True):
        assert (a.double() - b.double()).abs().max() <= TOLERANCES[dtype] * b.double().abs().max()


def run_partly_used():
    weight, x, update, _, _ = draw((3, 32), torch.float32)
    x = x.requires_grad_()
    with kernels("triton"):
        total, normed = add_rms_norm(x, update, weight, EPS)
    (from_total,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    (from_normed,) = torch.autograd.grad(normed.sum(), x)
    with kernels("torch"):
        (expected,) = torch.autograd.grad(rms_norm(x + update, weight, EPS).sum(), x)
    return from_total, from_normed, expected


def test_either_result_may_be_unused(interpreted):
    from_total, from_normed, expected = interpreted(run_partly_used)
    assert torch.equal(from_total, torch.ones(3, 32))
    torch.testing.assert_close(from_normed, expected, rtol=1e-5, atol=1e-5)


def run_with_a_poisoned_row(value):
    weight, x, update, _, _ = draw((3, 32), torch.float32)
    x[1] = value
    x = x.requires_grad_()
    with kernels("triton"):
        total, normed = add_rms_norm(x, update, weight, EPS)
    (dx,) = torch.autograd.grad((total.sum() + normed.sum()), x)
    return total.detach(), normed.detach(), dx


def test_a_row_reaches_no_other(interpreted):
    clean = interpreted(run_with_a_poisoned_row, 1.0)
    for a, b in zip(clean, interpreted(run_with_a_poisoned_row, float("nan")), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def run_without_rows():
    with kernels("triton"):
        return rms_norm(torch.ones(0, 32), torch.ones(32), EPS)


def test_no_rows_are_no_launch(interpreted):
    assert interpreted(run_without_rows).shape == (0, 32)


def test_on_the_cpu_adding_and_norming_is_bitwise_the_two_steps():
    weight, x, update, _, _ = draw((4, 64), torch.float32)
    norm = RmsNorm(weight, EPS)
    total, normed = norm.add(x, update)
    assert torch.equal(total, x + update)
    assert torch.equal(normed, norm.forward(x + update))
