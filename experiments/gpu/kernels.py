"""The Triton kernels on a device: against the formula in float64, themselves, and the clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from experiments.gpu.report import Section
from muxtune.support.tables import format_table, show_seconds

if TYPE_CHECKING:
    from torch import Tensor

Way = Literal["torch", "triton"]
WAYS: tuple[Way, ...] = ("torch", "triton")

TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-7}
"""Relative error in norm. In float32 what three tf32 products and sums of up to 11,008 terms leave; in
bfloat16 an activation is rounded to 8 bits, up to three times (sum, norm, weight)."""

_LIMIT_S = 2.0
"""Seconds for timing one case; five repetitions there are in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraCase:
    """Tasks with a pair on each of several linears that read the same input; factors are float32."""

    name: str
    tokens: tuple[int, ...]
    """Tokens of each task."""
    ranks: tuple[int, ...]
    """Rank of each task."""
    in_features: int
    out_features: tuple[int, ...]
    """Outputs of each linear."""
    dtype: str

    def __str__(self) -> str:
        return f"LoRA, {self.name}, {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCase:
    """Residual addition and norm."""

    tokens: int
    features: int
    dtype: str

    def __str__(self) -> str:
        return f"add and norm, {self.tokens} x {self.features}, {self.dtype}"


Case = LoraCase | NormCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One result of a kernel."""

    name: str
    error: float
    plain_error: float
    """Error of the PyTorch path, from the same float64 result."""
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """How the kernels did on a case."""

    case: str
    quantities: tuple[Quantity, ...]
    repeats: bool
    """Whether a second call gave bitwise the same."""
    times_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Median seconds by phase: the PyTorch path's and the kernels'."""

    @property
    def ok(self) -> bool:
        """Whether results repeat and errors are within their tolerance; a NaN is not."""
        return self.repeats and all(each.error <= each.tolerance for each in self.quantities)


def kernel_cases(device: str) -> list[Case]:
    """Sizes of Llama-2-7b and a tiny one on a GPU; what the interpreter can bear on the CPU."""
    small: list[Case] = [
        LoraCase(
            name="odd spans",
            tokens=(70, 1, 33),
            ranks=(1, 8, 64),
            in_features=40,
            out_features=(24, 9),
            dtype=dtype,
        )
        for dtype in TOLERANCES
    ]
    small += [NormCase(tokens=7, features=100, dtype=dtype) for dtype in TOLERANCES]
    if device == "cpu":
        return small
    ranks = (1, 3, 8, 8, 16, 16, 64, 64)
    cases: list[Case] = []
    for dtype in TOLERANCES:
        cases += [
            LoraCase(
                name=name,
                tokens=tokens,
                ranks=ranks[-len(tokens) :],
                in_features=in_features,
                out_features=out_features,
                dtype=dtype,
            )
            for name, tokens, in_features, out_features in (
                ("query, key, value, 8 x 256 tokens", (256,) * 8, 4096, (4096,) * 3),
                ("down, 8 x 256 tokens", (256,) * 8, 11008, (4096,)),
                ("query, key, value, 2048 tokens of one task", (2048,), 4096, (4096,) * 3),
            )
        ]
        cases.append(NormCase(tokens=2048, features=4096, dtype=dtype))
    return small + cases


def check_case(case: Case, device: str) -> KernelResult:
    """Errors, repeatability and times of one case.

    Args:
        case: Case to compute.
        device: ``cuda``; ``cpu`` only where triton interprets.
    """
    from profiler.devices import DEVICES
    from profiler.timing import time_repeatedly

    bound = DEVICES[device](0)
    runs = {way: _build(case, bound.name, way) for way in WAYS}
    results = {way: run.results() for way, run in runs.items()}
    exact = _build(case, bound.name, "exact").results()
    again = _build(case, bound.name, "triton").results()
    quantities = tuple(
        Quantity(
            name=name,
            error=max(_error(a, b) for a, b in zip(results["triton"][name], right, strict=True)),
            plain_error=max(_error(a, b) for a, b in zip(results["torch"][name], right, strict=True)),
            tolerance=TOLERANCES[str(results["torch"][name][0].dtype).removeprefix("torch.")],
        )
        for name, right in exact.items()
    )
    calls = [call for way in WAYS for call in (runs[way].forward, runs[way].backward)]
    samples = time_repeatedly([calls], bound.timer, limit_s=_LIMIT_S)
    forward, backward, triton_forward, triton_backward = (sample.median_s for sample in samples)
    return KernelResult(
        case=str(case),
        quantities=quantities,
        repeats=all(
            bool((a == b).all())
            for name in again
            for a, b in zip(again[name], results["triton"][name], strict=True)
        ),
        times_s={"forward": (forward, triton_forward), "backward": (backward, triton_backward)},
    )


@dataclass(frozen=True, slots=True)
class _Run:
    forward: Callable[[], object]
    backward: Callable[[], object]
    results: Callable[[], dict[str, list[Tensor]]]
    """Results of one forward and backward, by name."""


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def _build(case: Case, device: str, way: Way | Literal["exact"]) -> _Run:
    if isinstance(case, LoraCase):
        return _build_lora(case, device, way)
    return _build_norm(case, device, way)


def _build_lora(case: LoraCase, device: str, way: Way | Literal["exact"]) -> _Run:
    import torch

    from runtime.ops.kernels.tables import Piece
    from runtime.peft.lora_pieces import add_input_gradients_, add_updates_, factor_gradients

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: str = "float32") -> Tensor:
        values = torch.randn(*shape, generator=generator).to(getattr(torch, dtype))
        return values.to(device, torch.float64 if way == "exact" else values.dtype)

    pieces: list[Piece] = []
    factors: list[Tensor] = []
    start = 0
    for tokens, rank in zip(case.tokens, case.ranks, strict=True):
        first = 0
        for width in case.out_features:
            pieces.append((start, start + tokens, first, first + width, 2.0))
            # As after initialization and some steps: the update is of the size of the output.
            factors += [normal(rank, case.in_features) / case.in_features**0.5, normal(width, rank)]
            first += width
        start += tokens
    x, dx = (normal(start, case.in_features, dtype=case.dtype) for _ in range(2))
    y, grad = (normal(start, sum(case.out_features), dtype=case.dtype) for _ in range(2))
    grouped = way == "triton"
    downs: list[Tensor] = []

    def forward() -> None:
        downs[:] = add_updates_(y, x, pieces, factors, grouped=grouped)

    def backward() -> list[Tensor]:
        ddowns = add_input_gradients_(grad, dx, pieces, factors, grouped=grouped)
        return factor_gradients(grad, x, pieces, factors, downs, ddowns, grouped=grouped)

    def results() -> dict[str, list[Tensor]]:
        forward()
        grads = backward()
        return {
            "output": [y.clone()],
            "input gradient": [dx.clone()],
            "A gradients": grads[0::2],
            "B gradients": grads[1::2],
        }

    return _Run(forward, backward, results)


def _build_norm(case: NormCase, device: str, way: Way | Literal["exact"]) -> _Run:
    import torch

    from runtime.ops.elementwise import add_rms_norm
    from runtime.ops.kernels import kernels

    generator = torch.Generator().manual_seed(0)
    shape = (case.tokens, case.features)
    dtype = getattr(torch, case.dtype)
    x, update, dtotal, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    weight = torch.randn(case.features, generator=generator).to(dtype)
    tensors = [each.to(device) for each in (x, update, dtotal, grad, weight)]
    if way == "exact":
        tensors = [each.double() for each in tensors]
    x, update, dtotal, grad, weight = tensors
    x.requires_grad_()
    outputs: list[Tensor] = []

    def forward() -> None:
        if way == "exact":
            total = x + update
            scale = (total.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
            outputs[:] = [total, total * scale * weight]
            return
        with kernels(way):
            outputs[:] = add_rms_norm(x, update, weight, 1e-5)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, x, [dtotal, grad], retain_graph=True)

    def results() -> dict[str, list[Tensor]]:
        forward()
        grads = list(backward())
        total, normed = (each.detach() for each in outputs)
        return {"sum": [total], "norm": [normed], "input gradient": grads}

    return _Run(forward, backward, results)


def kernel_section(device: str) -> Section:
    """All cases on a device, and how they went."""
    results = []
    for case in kernel_cases(device):
        results.append(check_case(case, device))
        sys.stderr.write(f"gpu_check: {case}: {'ok' if results[-1].ok else 'FAILS'}\n")
    return describe_kernels(results)


def describe_kernels(results: Sequence[KernelResult]) -> Section:
    """Results as a section of the report."""
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} cases fail" if failed else f"all {len(results)} cases are right"
    text = f"""\
Errors are relative, in norm, to the same formula in float64. A kernel has to repeat bitwise.

{_error_table(results)}

Medians, adapters or norm alone, with a cold L2 cache. The ratio is that of the plain PyTorch path to the
kernels: above 1, the kernels are faster.

{_time_table(results)}"""
    return Section(title=f"Triton kernels: {verdict}", text=text, ok=not failed)


def _error_table(results: Sequence[KernelResult]) -> str:
    rows = [
        [
            result.case,
            quantity.name,
            f"{quantity.error:.1e}",
            f"{quantity.plain_error:.1e}",
            f"{quantity.tolerance:.1e}",
            "yes" if result.repeats else "NO",
            "ok" if quantity.error <= quantity.tolerance and result.repeats else "FAILS",
        ]
        for result in results
        for quantity in result.quantities
    ]
    return format_table(["case", "result", "kernels", "PyTorch", "tolerance", "repeats", ""], rows)


def _time_table(results: Sequence[KernelResult]) -> str:
    rows = [
        [result.case, phase, show_seconds(plain_s), show_seconds(triton_s), f"{plain_s / triton_s:.2f}"]
        for result in results
        for phase, (plain_s, triton_s) in result.times_s.items()
    ]
    return format_table(["case", "phase", "PyTorch", "kernels", "ratio"], rows)
