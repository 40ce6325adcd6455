"""The attention backends that a device runs against the masked reference in float64 on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from experiments.gpu.report import Section
from muxtune.batches import HTaskShape, MicrobatchLayout, layout_step
from muxtune.graph.attention_backends import AttentionName
from muxtune.model import Dtype
from muxtune.support.tables import format_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
CHUNK_TOKENS = 64

STREAMS: dict[str, tuple[tuple[int, ...], int]] = {
    "many short": ((40, 8, 36, 12, 32, 16, 28, 20, 24, 9), 1),
    "mixed, holes": ((256, 16, 200, 33, 97, 64), 1),
    "one long": ((1000,), 1),
    "carried keys": ((250, 64, 130, 33, 17), 4),
}
"""Lengths of the sequences, and micro-batches of the carry group over which they spread."""

TOLERANCES: dict[Dtype, float] = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 3e-2}
"""Relative errors in norm, of results and of gradients. In float32, kernels may multiply in tf32, whose unit
in the last place is 1e-3; of bfloat16 it is 8e-3, and probabilities are rounded to it."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A backend on one stream, rotary and with grouped queries."""

    backend: AttentionName
    dtype: Dtype
    stream: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.dtype}, {self.stream}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionResult:
    """How far a case is from the reference, relative in norm."""

    case: AttentionCase
    output_error: float
    gradient_error: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within the dtype's tolerance; a NaN is not."""
        tolerance = TOLERANCES[self.case.dtype]
        return self.output_error <= tolerance and self.gradient_error <= tolerance


def attention_cases(device: str) -> Iterator[AttentionCase]:
    """Every backend, dtype and stream that the device runs."""
    import torch

    from runtime.attention import AttentionSite, refusals

    kind = torch.device(device).type
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    for dtype in TOLERANCES:
        site = AttentionSite(
            device=kind, dtype=getattr(torch, dtype), head_dim=HEAD_DIM, capability=capability
        )
        for backend, needs in refusals(site).items():
            if needs is None:
                yield from (AttentionCase(backend, dtype, stream) for stream in STREAMS)


def check_attention_case(case: AttentionCase, *, device: str) -> AttentionResult:
    """Outputs and input gradients of a case's micro-batches against those of ``masked``."""
    import torch

    layouts = _layouts(case.stream)
    actual = _attend(case.backend, layouts, getattr(torch, case.dtype), device)
    expected = _attend("masked", layouts, torch.float64, "cpu")
    errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True)]
    return AttentionResult(case=case, output_error=errors[0], gradient_error=errors[1])


def _layouts(stream: str) -> list[MicrobatchLayout]:
    """Chunks leave holes behind the sequences that do not fill them."""
    lengths, carry = STREAMS[stream]
    chunks = sum(-(-length // CHUNK_TOKENS) for length in lengths)
    shape = HTaskShape(
        alignment="chunk",
        row_tokens=CHUNK_TOKENS,
        microbatches=carry,
        tokens=(1 + -(-chunks // carry)) * CHUNK_TOKENS,
        carry=carry,
    )
    return layout_step(shape, [np.array(lengths)])


def _attend(
    backend: AttentionName, layouts: Sequence[MicrobatchLayout], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Outputs and input gradients of a carry group, of all its micro-batches behind each other."""
    import torch

    from runtime.attention import RopeTables, build_attention_plan, causal_attention
    from runtime.attention.carried_kv import CarriedKv

    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(2048)[:, None] / 10 ** torch.linspace(0, 4, HEAD_DIM // 2)
    angles = torch.cat((angles, angles), -1)

    def narrow(x: Tensor) -> Tensor:
        """Rounded before it is widened, so that the reference computes with the very same numbers."""
        return x.bfloat16().to(device, dtype)

    rope = RopeTables.build(narrow(angles.cos()), narrow(angles.sin()))
    carried = CarriedKv()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    sent: list[Tensor] = []
    for number, layout in enumerate(layouts):
        x = torch.randn(layout.tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=generator)
        gradient = torch.randn(layout.tokens, HEADS * HEAD_DIM, generator=generator)
        inputs.append(narrow(x).requires_grad_())
        sent.append(narrow(gradient))
        plan = build_attention_plan(
            layout.segments,
            layout.tokens,
            device,
            backend=backend,
            carried=carried,
            earlier=layouts[:number],
        )
        outputs.append(causal_attention(inputs[-1], plan, HEADS, KV_HEADS, rope, "layer"))
    for output, gradient in zip(reversed(outputs), reversed(sent), strict=True):
        torch.autograd.backward(output, gradient)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return torch.cat([output.detach() for output in outputs]), torch.cat(gradients)


def attention_section(device: str) -> Section:
    """All cases of a device, and how they went."""
    results = []
    for case in attention_cases(device):
        results.append(check_attention_case(case, device=device))
        sys.stderr.write(f"gpu_check: {case}: {'ok' if results[-1].ok else 'FAILS'}\n")
    return describe_attention(results)


def describe_attention(results: Sequence[AttentionResult]) -> Section:
    """Results as a section of the report."""
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} cases differ" if failed else f"all {len(results)} cases agree"
    absent = sorted(set(get_args(AttentionName)) - {result.case.backend for result in results})
    text = f"""\
{HEADS} heads on {KV_HEADS} key-value heads of width {HEAD_DIM}, rotary, forward and backward, against
`masked` in float64 on the CPU. Errors are relative, in norm. Not run on this device:
{", ".join(absent) or "none"}.

{_table(results)}"""
    return Section(title=f"Attention backends: {verdict}", text=text, ok=not failed)


def _table(results: Sequence[AttentionResult]) -> str:
    rows = [
        [
            str(result.case),
            f"{result.output_error:.1e}",
            f"{result.gradient_error:.1e}",
            f"{TOLERANCES[result.case.dtype]:.0e}",
            "ok" if result.ok else "FAILS",
        ]
        for result in results
    ]
    return format_table(["case", "output", "gradient", "tolerance", ""], rows)
