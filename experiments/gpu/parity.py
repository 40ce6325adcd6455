"""The runtime's stages on a GPU against the CPU, with and without the Triton kernels."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.gpu.report import Section
from muxtune.batches import Alignment, layout_step, measure_shape
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.support.tables import format_table
from muxtune.tasks import TaskData, Workload, load_task_data, workload_from

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.data.batch import MicrobatchTensors

Kernels = Literal["torch", "triton"]
"""Implementation of adapters and norms."""

MODELS = ("llama-tiny", "gpt2-tiny")
ALIGNMENTS: tuple[Alignment, ...] = ("pad", "pack", "chunk")
CHUNK_TOKENS = 128
"""Holds every sequence of the tasks below."""

TOLERANCES: dict[tuple[str, Dtype], float] = {
    ("llama", "float32"): 1e-4,
    ("gpt2", "float32"): 1e-4,
    ("gpt2", "float64"): 1e-9,
    # Llama's norm is computed in float32 whatever the dtype, as transformers does, so devices that add up its
    # squares in another order differ: a CPU made to do so by 5e-7 in gradients.
    ("llama", "float64"): 1e-5,
}
"""Largest relative error, by family and dtype."""


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One micro-batch of three tasks through a whole backbone."""

    model: str
    dtype: Dtype
    alignment: Alignment
    kernels: Kernels = "torch"
    """Kernels on the device that is checked; the reference always uses torch."""

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.alignment}, {self.kernels}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """How far a device is from the reference, relative to the reference."""

    case: ParityCase
    loss_error: float
    """Largest of a task's loss."""
    gradient_error: float
    """Largest of a tensor of an adapter, in norm."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within the tolerance; a NaN is not."""
        return self.loss_error <= self.tolerance and self.gradient_error <= self.tolerance


def parity_cases() -> list[ParityCase]:
    """Every preset, dtype and alignment; float32 also by the kernels, which do not compute in float64."""
    ways: tuple[tuple[Dtype, Kernels], ...] = (
        ("float64", "torch"),
        ("float32", "torch"),
        ("float32", "triton"),
    )
    return [
        ParityCase(model, dtype, alignment, kernels)
        for model, (dtype, kernels), alignment in product(MODELS, ways, ALIGNMENTS)
    ]


def check_parity(case: ParityCase, *, device: str, reference: str = "cpu") -> ParityResult:
    """Forward and backward of the same micro-batch on two devices.

    Args:
        case: Case to compute.
        device: ``cuda[:N]``; ``cpu`` compares the reference with itself.
        reference: Device that is right.
    """
    from runtime.ops.kernels import kernels

    model = load_model_spec(case.model, case.dtype)
    data = [load_task_data(task, model) for task in _workload().tasks]
    adapters = [_trained_adapter(model, each) for each in data]
    with kernels(case.kernels):
        losses, gradients = _losses_and_gradients(model, data, adapters, case.alignment, device)
    with kernels("torch"):
        right_losses, right_gradients = _losses_and_gradients(
            model, data, adapters, case.alignment, reference
        )
    return ParityResult(
        case=case,
        loss_error=float(((losses - right_losses) / right_losses).abs().max()),
        gradient_error=max(
            float((gradients[key] - right).norm() / right.norm()) for key, right in right_gradients.items()
        ),
        tolerance=TOLERANCES[model.family, case.dtype],
    )


def _workload() -> Workload:
    """Unequal ranks and lengths; the sequences of one batch do not fit into one attention call."""
    choices = (("sst2", 1, 64), ("openbookqa", 8, 96), ("rte", 64, 128))
    tasks = [
        {
            "id": histogram,
            "peft": {"method": "lora", "r": r, "alpha": 2 * r, "targets": ["all-linear"]},
            "dataset": {"lengths": histogram},
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "max_length": max_length,
            "learning_rate": 1e-3,
            "steps": 1,
        }
        for histogram, r, max_length in choices
    ]
    return workload_from({"tasks": tasks}, "tasks of the parity check", Path())


def _trained_adapter(model: ModelSpec, data: TaskData) -> dict[str, Tensor]:
    """An adapter as after some steps: where B is still zero, A has no gradient to compare."""
    import torch

    from runtime.tasks.adapter_files import initial_adapter, load_adapter

    with tempfile.TemporaryDirectory() as folder:
        initial_adapter(model, data.task, Path(folder))
        initial = load_adapter(Path(folder))
    generator = torch.Generator().manual_seed(data.task.seed)
    return {
        key: tensor + 0.01 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for key, tensor in initial.items()
    }


def _losses_and_gradients(
    model: ModelSpec,
    data: Sequence[TaskData],
    adapters: Sequence[dict[str, Tensor]],
    alignment: Alignment,
    device: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each task, and gradients by task and peft's name; on the CPU."""
    from runtime.backbone.hugging_face import load_hf_model
    from runtime.backbone.stage import Stage

    stage = Stage(
        model, range(model.layers), first=True, last=True, weights=load_hf_model(model), device=device
    )
    for each, adapter in zip(data, adapters, strict=True):
        stage.add_task(each.task, adapter)
    losses = stage.forward(_microbatch(data, alignment, device), None)
    losses.sum().backward()
    gradients = {
        f"{each.task.id}: {key}": parameter.grad.cpu()
        for each in data
        for key, parameter in stage.task_parameters(each.task.id).items()
        if parameter.grad is not None
    }
    return losses.detach().cpu(), gradients


def _microbatch(data: Sequence[TaskData], alignment: Alignment, device: str) -> MicrobatchTensors:
    from runtime.data.batch import build_microbatch

    chunk_tokens = CHUNK_TOKENS if alignment == "chunk" else None
    shape = measure_shape(data, alignment, chunk_tokens=chunk_tokens)
    (layout,) = layout_step(shape, [each.batch_lengths(0) for each in data])
    task_ids = [each.task.id for each in data]
    return build_microbatch(layout, [each.batch(0) for each in data], device, task_ids=task_ids)


def parity_section(device: str) -> Section:
    """All cases on a device, and how they went; on the CPU, whole stages are too much for the interpreter."""
    results = []
    for case in parity_cases():
        if device == "cpu" and case.kernels == "triton":
            continue
        results.append(check_parity(case, device=device))
        sys.stderr.write(f"gpu_check: {case}: {'ok' if results[-1].ok else 'FAILS'}\n")
    return describe_parity(results)


def describe_parity(results: Sequence[ParityResult]) -> Section:
    """Results as a section of the report."""
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} cases differ" if failed else f"all {len(results)} cases agree"
    text = f"""\
One micro-batch of three tasks (LoRA of rank 1, 8 and 64 on every linear), forward and backward, through plain
PyTorch and through the Triton kernels. Errors are relative to the CPU: of a task's loss, and in norm of the
gradient of an adapter's tensor; the largest of each. Llama's norm is computed in float32 whatever the dtype.

{_parity_table(results)}"""
    return Section(title=f"Parity with the CPU: {verdict}", text=text, ok=not failed)


def _parity_table(results: Sequence[ParityResult]) -> str:
    rows = [
        [
            str(result.case),
            f"{result.loss_error:.1e}",
            f"{result.gradient_error:.1e}",
            f"{result.tolerance:.0e}",
            "ok" if result.ok else "FAILS",
        ]
        for result in results
    ]
    return format_table(["case", "loss", "gradients", "tolerance", ""], rows)
