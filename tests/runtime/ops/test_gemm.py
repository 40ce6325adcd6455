from __future__ import annotations

import pytest
import torch

from runtime.ops import gemm


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (0, 5, 7), (3, 200, 70), (700, 96, 256), (512, 8, 688)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_equal_those_in_float64(m, n, k, dtype):
    torch.manual_seed(0)
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    exact = x.double() @ w.double().T
    tolerance = 4 * k**0.5 * torch.finfo(dtype).eps  # rounding errors of k summands add up like a random walk
    for actual, expected in (
        (gemm.product(x, w), exact),
        (gemm.product(x, w, bias), exact + bias.double()),
        (gemm.product(x, w.T.contiguous().T), exact),
        (gemm.thin_product(x, w, 1.0), exact.T),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * k**0.5)


def test_strided_inputs_give_the_same():
    torch.manual_seed(0)
    wide, w = torch.randn(600, 512), torch.randn(128, 256)
    torch.testing.assert_close(gemm.product(wide[:, 256:], w), gemm.product(wide[:, 256:].contiguous(), w))
