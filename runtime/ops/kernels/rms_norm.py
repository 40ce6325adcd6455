"""Residual addition and root mean square norm in one pass over the tokens, and their backward in another.

As Llama computes it: the sum is rounded to the activations' dtype, the norm is computed in float32 and
rounded before the weight multiplies it. :func:`runtime.ops.elementwise.rms_norm_reference` is the reference.
One program has a row, so a result depends on nothing but its own row.
"""

# T tokens, D features

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.ops.autograd import Context


def triton_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` with a frozen weight."""
    result: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)
    return result


def triton_add_rms_norm(
    residual_TD: Tensor, update_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm with a frozen weight."""
    total_TD, normed_TD = _AddRmsNorm.apply(residual_TD, update_TD, weight_D, eps)
    return total_TD, normed_TD


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = x_TD.contiguous()
        _, normed_TD, scale_T = _launch_forward(x_TD, None, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, scale_T)
        return normed_TD

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return _launch_backward(grad_TD, None, *ctx.saved_tensors), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, residual_TD: Tensor, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total_TD, normed_TD, scale_T = _launch_forward(
            residual_TD.contiguous(), update_TD.contiguous(), weight_D, eps
        )
        ctx.save_for_backward(total_TD, weight_D, scale_T)
        ctx.set_materialize_grads(False)  # a stage's last sum may be unused: no need to read zeros
        return total_TD, normed_TD

    @staticmethod
    def backward(
        ctx: Context, dtotal_TD: Tensor | None, grad_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        dx_TD = dtotal_TD if grad_TD is None else _launch_backward(grad_TD, dtotal_TD, *ctx.saved_tensors)
        return dx_TD, dx_TD, None, None


def _launch_forward(
    x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total_TD = x_TD if update_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    scale_T = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    features = x_TD.shape[1]
    block = triton.next_power_of_2(features)
    if len(x_TD):
        with torch.cuda.device_of(x_TD):
            _forward[(len(x_TD),)](
                x_TD,
                update_TD,
                weight_D,
                total_TD,
                normed_TD,
                scale_T,
                features,
                eps,
                ADD=update_TD is not None,
                BLOCK=block,
                num_warps=_warps(block),
                enable_fp_fusion=True,
            )
    return total_TD, normed_TD, scale_T


def _launch_backward(
    grad_TD: Tensor, dtotal_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> Tensor:
    dx_TD = torch.empty_like(x_TD)
    features = x_TD.shape[1]
    block = triton.next_power_of_2(features)
    if len(x_TD):
        with torch.cuda.device_of(x_TD):
            _backward[(len(x_TD),)](
                grad_TD.contiguous(),
                None if dtotal_TD is None else dtotal_TD.contiguous(),
                x_TD,
                weight_D,
                scale_T,
                dx_TD,
                features,
                ADD=dtotal_TD is not None,
                BLOCK=block,
                num_warps=_warps(block),
                enable_fp_fusion=True,
            )
    return dx_TD


def _warps(block: int) -> int:
    """8 values per thread, but at least 1 and at most 16 warps."""
    return min(max(block // 256, 1), 16)


@triton.jit
def _forward(
    x: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    scales: tl.tensor,
    features: int,
    eps: float,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    own = columns < features
    places = row * features + columns
    value = tl.load(x + places, mask=own, other=0.0)
    dtype = value.dtype
    if ADD:
        added = tl.load(update + places, mask=own, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + places, value, mask=own)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / features + eps)
    tl.store(scales + row, scale)
    rounded = (exact * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=own, other=0.0).to(tl.float32)
    tl.store(normed + places, (rounded * factor).to(dtype), mask=own)


@triton.jit
def _backward(
    grad: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    dx: tl.tensor,
    features: int,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    own = columns < features
    places = row * features + columns
    value = tl.load(x + places, mask=own, other=0.0)
    exact = value.to(tl.float32)
    scale = tl.load(scales + row)
    inner = tl.load(grad + places, mask=own, other=0.0).to(tl.float32)
    inner *= tl.load(weight + columns, mask=own, other=0.0).to(tl.float32)
    along = tl.sum(inner * exact, axis=0) * scale * scale * scale / features
    result = inner * scale - exact * along
    if ADD:
        result += tl.load(dtotal + places, mask=own, other=0.0).to(tl.float32)
    tl.store(dx + places, result.to(value.dtype), mask=own)
