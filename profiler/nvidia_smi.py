"""What NVIDIA's driver says about a GPU, by its command ``nvidia-smi``."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

_THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of nvml.h that mean throttling; others say that the GPU is idle or that its clocks were set."""


_ABSENT = ("[", "N/A")
"""Beginnings of an answer that says that there is none, such as [Not Supported]."""


def query_gpu(
    uuid: str, fields: Sequence[str], meanwhile: Callable[[], object] | None = None
) -> dict[str, str]:
    """Values of ``--query-gpu`` fields of one GPU.

    Args:
        uuid: UUID of the GPU; its index would not do, as CUDA_VISIBLE_DEVICES renumbers.
        fields: Names of fields, as ``nvidia-smi --help-query-gpu`` lists them.
        meanwhile: Called again and again until the answer is there.

    Returns:
        Values by field; without those that this GPU does not have, and empty where the command is missing or
        fails.
    """
    command = [
        "nvidia-smi",
        f"--id={uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    with process:
        while meanwhile is not None and process.poll() is None:
            meanwhile()
        answer, _ = process.communicate()
    values = [value.strip() for value in answer.strip().split(",")]
    if process.returncode != 0 or len(values) != len(fields):
        return {}
    return {
        field: value for field, value in zip(fields, values, strict=True) if not value.startswith(_ABSENT)
    }


def throttle_reasons(mask: str) -> tuple[str, ...]:
    """Names of the reasons in a ``clocks_throttle_reasons.active``, e.g. ``0x0000000000000004``."""
    bits = int(mask, 16)
    return tuple(name for bit, name in _THROTTLE_REASONS.items() if bits & bit)
