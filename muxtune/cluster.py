"""The machine: devices, links and how many ranks there are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxtune.errors import SpecError, UserError, spec_error_from


class DeviceSpec(BaseModel):
    """One rank's device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int = Field(gt=0)
    """What a rank may fill."""


class LinkSpec(BaseModel):
    """Point-to-point link: ``latency_s`` + n / ``bandwidth_bytes_per_s``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    """Achieved rate of large messages, not the data-sheet rate."""

    def transfer_s(self, bytes_: float) -> float:
        """Seconds from first to last byte on an idle link."""
        return self.latency_s + bytes_ / self.bandwidth_bytes_per_s


class ClusterSpec(BaseModel):
    """Equal devices on equal links."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    device: DeviceSpec
    ranks: int = Field(gt=0)
    link: LinkSpec
    """As a note: profiles bring measured transfers, and no cost is computed from it yet."""


LOOPBACK = LinkSpec(name="loopback-gloo", latency_s=150e-6, bandwidth_bytes_per_s=1.5e9)
"""Order of magnitude of gloo over loopback TCP; a profile's measured transfers come first."""

MAX_CPU_RANKS = 64


def cluster_names() -> list[str]:
    """Names that :func:`load_cluster` knows, ``cpu-N`` shown for the cores of this machine."""
    return [f"cpu-{n}" for n in range(1, (os.cpu_count() or 1) + 1)]


def load_cluster(name_or_path: str) -> ClusterSpec:
    """``cpu-N`` (N one-thread ranks of this machine), or a YAML file with a cluster.

    Raises:
        UserError: Unknown name, unreadable file or a wrong field.
    """
    match = re.fullmatch(r"cpu-([1-9]\d*)", name_or_path)
    if match:
        ranks = int(match[1])
        if ranks > MAX_CPU_RANKS:
            raise SpecError("cluster", name_or_path, f"at most cpu-{MAX_CPU_RANKS}")
        memory_bytes = _physical_memory_bytes() // ranks
        device = DeviceSpec(name="cpu", kind="cpu", memory_bytes=memory_bytes)
        return ClusterSpec(name=name_or_path, device=device, ranks=ranks, link=LOOPBACK)
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        raise UserError(f"no cluster named {name_or_path!r}; expected cpu-N or a path to a YAML file")
    try:
        return ClusterSpec.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read the cluster {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
