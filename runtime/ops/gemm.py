"""Matrix products of frozen weights and low-rank factors, by the fastest library for their shape.

On CPU, torch multiplies float32 matrices with MKL. oneDNN, which torch ships too, reaches 250 instead of
113 GFLOP/s on one AVX-512 core of an AMD EPYC (Zen 5; 512 tokens, 256 to 688 features) in the same precision,
but has a fixed cost of about 12 us, and compiles a kernel for every new shape. Micro-batches of an hTask are
equally long, so the frozen products pay that once; what depends on one task's tokens or targets would pay it
again and again. Both give the same result up to rounding; the tests compare them.

All functions run outside of autograd: they are called inside of autograd functions.
"""

# T tokens, I features in, O features out, R rank

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor

ONEDNN_FROM_MULTIPLICATIONS = 1 << 20
"""Where the higher rate outweighs the fixed cost: 256 x 8 x 512 takes 29 us with either library."""

ONEDNN_FROM_MULTIPLICATIONS_ONCE = 1 << 27
"""Where it also outweighs compiling a kernel, about a millisecond, for a shape that may not come again."""

_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
if _ONEDNN_LINEAR is not None:
    _ONEDNN_LINEAR = _ONEDNN_LINEAR.default


def product(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, *, static_shape: bool = True) -> Tensor:
    """``x w^T + bias``, ``[M, N]``; ``static_shape`` says that M comes again and again."""
    worthwhile = ONEDNN_FROM_MULTIPLICATIONS if static_shape else ONEDNN_FROM_MULTIPLICATIONS_ONCE
    if (
        _ONEDNN_LINEAR is not None
        and x_MK.dtype == torch.float32
        and x_MK.device.type == "cpu"
        and x_MK.shape[0] * w_NK.numel() >= worthwhile
    ):
        result: Tensor = _ONEDNN_LINEAR(x_MK, w_NK, bias_N, "none", [], "")
        return result
    return F.linear(x_MK, w_NK, bias_N)


def thin_product(x_MK: Tensor, w_RK: Tensor, scale: float) -> Tensor:
    """``scale * w x^T``, ``[R, M]`` with few rows: MKL is up to twice as fast at this as at ``x w^T``."""
    if x_MK.device.type == "cpu" and x_MK.shape[0] * w_RK.numel() >= ONEDNN_FROM_MULTIPLICATIONS_ONCE:
        return product(x_MK, w_RK, static_shape=False).t().mul_(scale)
    # beta = 0: the first operand is not read. One call instead of product and scaling.
    return torch.addmm(_unread(w_RK.dtype, w_RK.device), w_RK, x_MK.t(), beta=0, alpha=scale)


@cache
def _unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(1, 1, dtype=dtype, device=device)
