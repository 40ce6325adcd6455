"""Whether a tensor goes through the Triton kernels or through plain PyTorch.

``MUXTUNE_KERNELS`` decides: ``torch`` never takes a kernel, ``auto`` (the default) takes them for tensors on
an NVIDIA GPU where triton is installed, ``triton`` insists on them. Triton's interpreter
(``TRITON_INTERPRET=1``) runs kernels on tensors of the CPU, slowly, so there it has to be asked for by
``triton``. Float64 always goes through PyTorch: it is for checking, and the kernels compute in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from muxtune.support.errors import SpecError, UserError

VARIABLE = "MUXTUNE_KERNELS"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"

Mode = Literal["torch", "triton", "auto"]

_DTYPES = frozenset((torch.float32, torch.bfloat16))

_MIN_CAPABILITY = (8, 0)
"""Ampere, the first with matrix units for bfloat16 and tf32."""

_override: Mode | None = None


def use_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor, and on others of its device and dtype, take their Triton kernel.

    Raises:
        SpecError: ``MUXTUNE_KERNELS`` has no such value.
        UserError: It insists on kernels that cannot run here.
    """
    mode = _override or kernel_mode()
    if mode == "torch" or (mode == "auto" and not tensor.is_cuda) or tensor.dtype not in _DTYPES:
        return False
    obstacle = _obstacle(tensor.device)
    if obstacle is not None and mode == "triton":
        raise UserError(f"{VARIABLE} = 'triton': {obstacle}; expected torch or auto")
    return obstacle is None


@cache
def kernel_mode() -> Mode:
    """What the environment asks for; read once per process, because every operator asks.

    Raises:
        SpecError: Something else than ``torch``, ``triton`` and ``auto``.
    """
    value = os.environ.get(VARIABLE, "auto")
    for mode in get_args(Mode):
        if value == mode:
            return mode  # type: ignore[no-any-return]  # get_args forgets the type
    raise SpecError(VARIABLE, value, "torch, triton or auto")


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """Overrule the environment for the forwards inside; a backward goes the way of its forward."""
    global _override  # noqa: PLW0603  # a switch of the process, as the variable is
    before, _override = _override, mode
    try:
        yield
    finally:
        _override = before


@cache
def _obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get(INTERPRETER_VARIABLE) == "1":
            return None
        return f"kernels run on the CPU only in triton's interpreter ({INTERPRETER_VARIABLE}=1)"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None
