"""What only a GPU can show: the runtime's stages against the CPU, its kernels, what operators cost there.

    python -m experiments.gpu.check --out docs/gpu-report.md

Every part runs in a process of its own, under a time limit: a kernel that writes where it must not leaves a
process without its GPU, and a part that hangs would hide the others. All take at most twelve minutes.

Exit code 0 if all is well, 1 if something differs or a part failed (the report is written all the same), 2
without a CUDA device.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.gpu.attention import attention_section
from experiments.gpu.kernels import kernel_section
from experiments.gpu.parity import MODELS, parity_section
from experiments.gpu.report import Section, write_report
from experiments.gpu.runs import runs_section
from muxtune.costs import Measurement, Profile
from muxtune.costs.operator_work import operator_work
from muxtune.costs.profile import describe_dims
from muxtune.model import load_model_spec
from muxtune.support.errors import UserError
from muxtune.support.files import write_text_atomically
from muxtune.support.tables import format_table, show_seconds

__all__ = ["PARTS", "Part", "main", "run_part"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the check."""

    title: str
    check: Callable[[str], Section]
    """Function that checks a device, ``cuda`` or ``cpu``."""
    limit_s: float


def profile_section(device: str) -> Section:
    """A quick profile of a device."""
    from profiler import profile_model

    profile = profile_model(load_model_spec(MODELS[0]), device=device, quick=True, ranks=1, progress=True)
    return describe_profile(profile)


def describe_profile(profile: Profile) -> Section:
    """A profile's largest operators as a section of the report."""
    text = f"""\
Quick profile `{profile.profile_id}`: the largest measured shape of each kind, medians.
GFLOP/s and GB/s are the forward's, with its work counted as in `muxtune/costs/operator_work.py`.

{_operator_table(profile)}"""
    return Section(title=f"Operators of {profile.model.name}, {profile.model.dtype}", text=text, ok=True)


PARTS = {
    "parity": Part("Parity with the CPU", parity_section, 120),
    "attention": Part("Attention backends", attention_section, 120),
    "runs": Part("Runs against the CPU", runs_section, 120),
    "kernels": Part("Triton kernels", kernel_section, 120),
    "profile": Part("Operators", profile_section, 240),
}
"""Parts by the name that ``--parts`` takes, in the order of the report."""


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


def run_part(name: str, device: str, folder: Path) -> Section:
    """Run a part in a process of its own.

    Args:
        name: Name of the part.
        device: ``cuda`` or ``cpu``.
        folder: Folder for what the process writes.

    Returns:
        What it found, or how it failed. Its stderr is passed on.
    """
    part = PARTS[name]
    out = folder / f"{name}.json"
    command = [sys.executable, "-P", "-m", "experiments.gpu.check", "--part", name, "--device", device]
    start_s = time.monotonic()
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # what a library prints; ours is one line at the end
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes end with it
    )
    assert process.stderr is not None
    limit = threading.Timer(part.limit_s, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    last_line = ""
    for line in process.stderr:
        sys.stderr.write(line)
        last_line = line.strip() or last_line
    code = process.wait()
    limit.cancel()
    if code == 0:
        return Section.model_validate_json(out.read_text())
    took_s = time.monotonic() - start_s
    reason = f"it took longer than {part.limit_s:.0f} s" if took_s >= part.limit_s else f"exit code {code}"
    return Section(
        title=f"{part.title}: FAILED",
        text=f"The part ended early: {reason}. Its last words:\n\n    {last_line or '(none)'}",
        ok=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write the report and say where it is.

    Args:
        arguments: Arguments of the command line; those of the process by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu tries the check itself, small: kernels are interpreted (TRITON_INTERPRET=1)",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of the process of a part
    given = parser.parse_args(arguments)
    if given.part is not None:
        section = PARTS[given.part].check(given.device)
        write_text_atomically(given.out, section.model_dump_json())
        return 0
    try:
        return _check(given.out, given.device, given.parts)
    except UserError as error:
        sys.stderr.write(f"gpu_check: error: {error}\n")
        return 2


def _check(out: Path, device: str, names: Sequence[str]) -> int:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine, or a torch build without CUDA: nothing was checked")
    description = torch.cuda.get_device_name() if device == "cuda" else "CPU, kernels interpreted"
    with tempfile.TemporaryDirectory() as folder:
        sections = [run_part(name, device, Path(folder)) for name in names]
    write_report(out, description, sections)
    for section in sections:
        sys.stderr.write(f"gpu_check: {section.title}\n")
    sys.stdout.write(f"written to {out}\n")
    return 0 if all(section.ok for section in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
