"""The kernels become machine code for A40, A100 and H100 on a machine without a GPU.

Triton brings NVIDIA's assembler. A driver that compiles what is launched, and runs nothing, shows what the
interpreter cannot: whether the compiler takes the kernels, and whether they fit into a multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import process_with

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Per thread block, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    name: str
    shared_bytes: int
    registers: int
    spilled_bytes: int


class CompilingDriver:
    """What triton asks of a driver, for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.binaries: list[Binary] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_BYTES[capability],
                "multiprocessor_count": 100,
            },
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return lambda *arguments, **options: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load(self, name: str, binary: bytes, shared_bytes: int, device: int) -> tuple[int, ...]:
        import triton.backends.nvidia

        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            )
        registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        self.binaries.append(Binary(name, shared_bytes, int(registers), int(spilled)))
        return 1, 1, int(registers), int(spilled), 1024


def compile_kernels(capability: int, dtype: torch.dtype, features: int) -> list[Binary]:
    """Launch everything on a linear of Llama-2-7b's size or so, with ranks up to 64."""
    from triton.runtime import driver

    from runtime.ops.dropout import Dropout, linear_key
    from runtime.ops.kernels import grouped_lora, lora_kernels, rms_norm

    compiling = CompilingDriver(capability)
    driver.set_active(compiling)
    for module in (lora_kernels, rms_norm):
        for kernel in vars(module).values():
            getattr(kernel, "device_caches", {}).clear()
    x, y = torch.empty(300, features, dtype=dtype), torch.empty(300, features + 1024, dtype=dtype)
    pieces = [
        (0, 100, 0, features, 1.0),
        (0, 100, features, features + 1024, 1.0),
        (100, 300, 0, features, 2.0),
    ]
    factors = []
    for (_, _, first, last, _), rank in zip(pieces, (8, 64, 3), strict=True):
        factors += [torch.empty(rank, features), torch.empty(last - first, rank)]
    dropout = Dropout(0.1, linear_key("any"))
    dropped = grouped_lora.Masks(torch.zeros(300, dtype=torch.int64), (dropout, None, dropout))
    for masks in (None, dropped):
        down = grouped_lora.add_updates_(y, x, pieces, factors, masks)
        ddown = grouped_lora.add_input_gradients_(y, x.clone(), pieces, factors, masks)
        grouped_lora.factor_gradients(y, x, pieces, factors, down, ddown, masks)
    weight = torch.empty(features, dtype=dtype)
    total, normed = rms_norm.triton_add_rms_norm(x.requires_grad_(), x.detach(), weight, 1e-5)
    (total.sum() + normed.sum()).backward()
    rms_norm.triton_rms_norm(x, weight, 1e-5).sum().backward()
    return compiling.binaries


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Iterator[Any]:
    """A process whose triton compiles, into a cache of its own."""
    cache = tmp_path_factory.mktemp("triton")
    with process_with({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}) as call:
        if not call(_has_assembler):
            pytest.skip("triton brings no assembler (ptxas) and cuobjdump here")
        yield call


def _has_assembler() -> bool:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    return all((tools / name).is_file() for name in ("ptxas", "cuobjdump"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit_into_a_multiprocessor(compiler, capability, dtype):
    binaries = compiler(compile_kernels, capability, dtype, 4096)
    assert {b.name for b in binaries} == {
        "shrink",
        "sum_parts",
        "expand",
        "outer",
        "_forward",
        "_backward",
    }
    for binary in binaries:
        assert binary.spilled_bytes <= 16, binary  # of a thread; a register or two do no harm
        # Two blocks of at most 8 warps share the 65,536 registers and the memory of a multiprocessor.
        assert binary.shared_bytes * 2 <= SHARED_BYTES[capability], binary


@pytest.mark.slow
def test_sizes_that_are_no_multiples_of_16_compile_too(compiler):
    assert compiler(compile_kernels, 80, torch.bfloat16, 4099)
