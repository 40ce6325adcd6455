"""Norms and activations with lean backwards, equal to the modules of transformers."""

# T tokens, D hidden size, F width of the MLP

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from muxtune.support.errors import SpecError
from runtime.ops.autograd import Context
from runtime.ops.kernels import use_triton


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` as LlamaRMSNorm computes it: in float32 whatever the dtype, float64 included.

    In float64 this very sequence of operations is needed: any other would differ by a float32 rounding.
    """
    x32_TD = x_TD.to(torch.float32)
    variance_T1 = x32_TD.pow(2).mean(-1, keepdim=True)
    return weight_D * (x32_TD * torch.rsqrt(variance_T1 + eps)).to(x_TD.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm_reference`, for float32 in half of its time, and on a GPU in one kernel."""
    if use_triton(x_TD):
        from runtime.ops.kernels.rms_norm import triton_rms_norm  # noqa: PLC0415  # needs triton

        return triton_rms_norm(x_TD, weight_D, eps)
    if x_TD.dtype == torch.float32:
        result: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)
        return result
    return rms_norm_reference(x_TD, weight_D, eps)


def add_rms_norm(
    residual_TD: Tensor, update_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``residual + update`` and its :func:`rms_norm`; on a GPU in one kernel."""
    if use_triton(residual_TD):
        from runtime.ops.kernels.rms_norm import triton_add_rms_norm  # noqa: PLC0415  # needs triton

        return triton_add_rms_norm(residual_TD, update_TD, weight_D, eps)
    total_TD = residual_TD + update_TD
    return total_TD, rms_norm(total_TD, weight_D, eps)


class _RmsNorm(torch.autograd.Function):
    """Root mean square norm with a frozen weight; saves the input and one number per token."""

    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # vector_norm reads the input once and writes nothing of its size.
        variance_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1])
        scale_T1 = variance_T1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return torch.mul(x_TD, scale_T1).mul_(weight_D)

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        dx_TD = grad_TD * weight_D
        along_T1 = torch.linalg.vecdot(dx_TD, x_TD).unsqueeze(-1)
        along_T1.mul_(scale_T1.pow(3)).div_(-x_TD.shape[-1])
        return dx_TD.mul_(scale_T1).addcmul_(x_TD, along_T1), None, None


class RmsNorm(nn.Module):
    """Llama's norm."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(weight_D.detach().clone(), requires_grad=False)
        self._eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalized tokens."""
        return rms_norm(x_TD, self.weight_D, self._eps)

    def add(self, residual_TD: Tensor, update_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, and its tokens normalized."""
        return add_rms_norm(residual_TD, update_TD, self.weight_D, self._eps)


class LayerNorm(nn.Module):
    """GPT-2's and OPT's norm."""

    def __init__(self, weight_D: Tensor, bias_D: Tensor, eps: float) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(weight_D.detach().clone(), requires_grad=False)
        self.bias_D = nn.Parameter(bias_D.detach().clone(), requires_grad=False)
        self._eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalized tokens."""
        return F.layer_norm(x_TD, self.weight_D.shape, self.weight_D, self.bias_D, self._eps)

    def add(self, residual_TD: Tensor, update_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both, and its tokens normalized."""
        total_TD = residual_TD + update_TD
        return total_TD, self.forward(total_TD)


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * up`` of gate|up side by side; both gradients go straight into one tensor."""

    @staticmethod
    def forward(ctx: Context, gate_up_T2F: Tensor) -> Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        active_TF = F.silu(gate_TF)
        ctx.save_for_backward(gate_up_T2F, active_TF)
        return active_TF * up_TF

    @staticmethod
    def backward(ctx: Context, grad_TF: Tensor) -> Tensor:
        gate_up_T2F, active_TF = ctx.saved_tensors
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        grad_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = grad_T2F.chunk(2, dim=-1)
        torch.mul(grad_TF, active_TF, out=dup_TF)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up_TF, gate_TF, grad_input=dgate_TF)
        return grad_T2F


class _GeluNew(torch.autograd.Function):
    """Tanh-approximated GELU as ``x sigmoid(x (a + b x^2))``: the same, since 1 + tanh(z) = 2 sigmoid(2z).

    Torch's tanh takes ten times as long as its sigmoid on CPU: 600 against 250 us for [512, 1024].
    """

    A = 2 * math.sqrt(2 / math.pi)
    B = 0.044715 * A

    @staticmethod
    def forward(ctx: Context, x_TF: Tensor) -> Tensor:
        inner_TF = x_TF * x_TF
        sigmoid_TF = inner_TF.mul_(_GeluNew.B).add_(_GeluNew.A).mul_(x_TF).sigmoid_()
        ctx.save_for_backward(x_TF, sigmoid_TF)
        return x_TF * sigmoid_TF

    @staticmethod
    def backward(ctx: Context, grad_TF: Tensor) -> Tensor:
        x_TF: Tensor
        sigmoid_TF: Tensor
        x_TF, sigmoid_TF = ctx.saved_tensors
        # s + x s (1 - s) (a + 3 b x^2) = s (1 + (1 - s) x (a + 3 b x^2))
        slope_TF = x_TF * x_TF
        slope_TF.mul_(3 * _GeluNew.B).add_(_GeluNew.A).mul_(x_TF).mul_(1 - sigmoid_TF)
        slope_TF.add_(1).mul_(sigmoid_TF).mul_(grad_TF)
        return slope_TF


def gelu_new(x_TF: Tensor) -> Tensor:
    """GPT-2's activation."""
    result: Tensor = _GeluNew.apply(x_TF)
    return result


Activation = Callable[[Tensor], Tensor]


def find_activation(name: str) -> Activation:
    """An activation by the name that a Hugging Face configuration gives it.

    Raises:
        SpecError: There is none of that name.
    """
    if name in {"gelu_new", "gelu_pytorch_tanh"}:
        return gelu_new
    from transformers.activations import ACT2FN  # noqa: PLC0415  # seconds to import

    if name not in ACT2FN:
        raise SpecError("model.activation", name, "an activation of transformers, such as silu or gelu_new")
    activation: Activation = ACT2FN[name]
    return activation


def find_gated_activation(name: str) -> Activation:
    """``act(gate) * up`` of a tensor that has gate and up side by side."""
    if name in {"silu", "swish"}:

        def gated_silu(gate_up_T2F: Tensor) -> Tensor:
            result: Tensor = _GatedSilu.apply(gate_up_T2F)
            return result

        return gated_silu
    activation = find_activation(name)

    def gated(gate_up_T2F: Tensor) -> Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return activation(gate_TF) * up_TF

    return gated
