"""What only a GPU can show: the runtime's stages on it against the CPU, and what operators cost there.

    python -m experiments.gpu_check --out docs/gpu-report.md

The runtime does not execute plans on CUDA yet; this says whether its stages already compute the same there.
Exit code 0 if they do, 1 if they do not (the report is written all the same), 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from muxtune.alignment import Alignment, layout_step
from muxtune.costs import Measurement, Profile
from muxtune.costs.profile import describe_dims
from muxtune.costs.work import operator_work
from muxtune.dataset import TaskData, load_task_data
from muxtune.errors import UserError
from muxtune.files import write_text_atomically
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.shapes import measure_shape
from muxtune.tables import format_table, show_seconds
from muxtune.workload import Workload, workload_from

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.batch import MicrobatchTensors

__all__ = ["ParityCase", "ParityResult", "check_parity", "parity_cases", "write_report"]

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

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.alignment}"


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
    """Every preset, dtype and alignment."""
    dtypes: tuple[Dtype, ...] = ("float64", "float32")
    return [ParityCase(*each) for each in product(MODELS, dtypes, ALIGNMENTS)]


def check_parity(case: ParityCase, *, device: str, reference: str = "cpu") -> ParityResult:
    """Forward and backward of the same micro-batch on two devices.

    Args:
        case: What to compute.
        device: ``cuda[:N]``; ``cpu`` compares the reference with itself.
        reference: Device that is right.
    """
    model = load_model_spec(case.model, case.dtype)
    data = [load_task_data(task, model) for task in _workload().tasks]
    adapters = [_trained_adapter(model, each) for each in data]
    losses, gradients = _losses_and_gradients(model, data, adapters, case.alignment, device)
    right_losses, right_gradients = _losses_and_gradients(model, data, adapters, case.alignment, reference)
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

    from runtime.adapters import initial_adapter, load_adapter

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
    from runtime.backbone import Stage, load_hf_model

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
    from runtime.batch import build_microbatch

    chunk_tokens = CHUNK_TOKENS if alignment == "chunk" else None
    shape = measure_shape(data, alignment, chunk_tokens=chunk_tokens)
    (layout,) = layout_step(shape, [each.batch_lengths(0) for each in data])
    task_ids = [each.task.id for each in data]
    return build_microbatch(layout, [each.batch(0) for each in data], device, task_ids=task_ids)


def write_report(out: Path, device: str, results: Sequence[ParityResult], profile: Profile) -> None:
    """The findings as Markdown.

    Args:
        out: The file; whole or absent.
        device: What the parities were checked on, in words.
        results: Of all cases.
        profile: Measured on the same device.
    """
    failed = sum(not result.ok for result in results)
    verdict = f"{failed} of {len(results)} cases differ" if failed else f"all {len(results)} cases agree"
    versions = ", ".join(
        [f"Python {platform.python_version()}"]
        + [f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "muxtune")]
    )
    lines = [
        "# GPU report",
        "",
        f"{device}; {versions}; {datetime.now(UTC):%Y-%m-%d}. Written by `make gpu-check`.",
        "",
        f"## Parity with the CPU: {verdict}",
        "",
        "One micro-batch of three tasks (LoRA of rank 1, 8 and 64 on every linear), forward and backward.",
        "Errors are relative to the CPU: of a task's loss, and in norm of the gradient of an adapter's",
        "tensor; the largest of each. Llama's norm is computed in float32 whatever the dtype.",
        "",
        _parity_table(results),
        "",
        f"## Operators of {profile.model.name}, {profile.model.dtype}",
        "",
        f"Quick profile `{profile.profile_id}`: the largest measured shape of each kind, medians.",
        "GFLOP/s and GB/s are the forward's, with its work counted as in `muxtune/costs/work.py`.",
        "",
        _operator_table(profile),
    ]
    write_text_atomically(out, "\n".join(lines) + "\n")


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


def _operator_table(profile: Profile) -> str:
    rows = []
    for forward, backward in _largest(profile):
        work, seconds = operator_work(forward.op, "fwd", profile.model), forward.median_s
        rows.append(
            [
                forward.op.kind,
                describe_dims(forward.op).replace(",", ", "),
                show_seconds(seconds),
                "-" if backward is None else show_seconds(backward.median_s),
                f"{work.flops / seconds / 1e9:,.0f}",
                f"{work.bytes / seconds / 1e9:,.1f}",
            ]
        )
    return format_table(["operator", "shape", "forward", "backward", "GFLOP/s", "GB/s"], rows)


def _largest(profile: Profile) -> Iterator[tuple[Measurement, Measurement | None]]:
    """Forward and backward of the shape with the most bytes, for every kind that can be counted."""
    by_phase = {(m.op, m.phase): m for m in profile.measurements}
    kinds = sorted({m.op.kind for m in profile.measurements} - {"stage"})
    for kind in kinds:
        forward = max(
            (m for m in profile.of_kind(kind) if m.phase == "fwd"),
            key=lambda m: operator_work(m.op, "fwd", profile.model).bytes,
        )
        yield forward, by_phase.get((forward.op, "bwd"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write the report and say where it is.

    Args:
        arguments: Of the command line; those of the process by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    out: Path = parser.parse_args(arguments).out
    try:
        return _check(out)
    except UserError as error:
        sys.stderr.write(f"gpu_check: error: {error}\n")
        return 2


def _check(out: Path) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine, or a torch build without CUDA: nothing was checked")
    from profiler import profile_model

    results = []
    for case in parity_cases():
        results.append(check_parity(case, device="cuda"))
        sys.stderr.write(f"gpu_check: {case}: {'ok' if results[-1].ok else 'FAILS'}\n")
    profile = profile_model(load_model_spec(MODELS[0]), device="cuda", quick=True, ranks=1, progress=True)
    write_report(out, torch.cuda.get_device_name(), results, profile)
    sys.stdout.write(f"written to {out}\n")
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
