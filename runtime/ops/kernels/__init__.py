"""Triton kernels for CUDA, and the switch that chooses them; importing this needs no triton."""

from runtime.ops.kernels.choice import kernel_mode, kernels, use_triton

__all__ = ["kernel_mode", "kernels", "use_triton"]
