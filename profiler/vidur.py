"""Measurements that the Vidur simulator publishes (MIT licence), found in its folders and made one table.

    ROOT (data/profiling) / compute / DEVICE / ORGANIZATION / MODEL / mlp.csv, attention.csv
                          / network / TOPOLOGY / all_reduce.csv, send_recv.csv

A topology begins with its device's name: ``a40_pairwise_nvlink``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from muxtune.costs.devices import device_names
from muxtune.costs.measurements import LAYOUTS, MeasurementsProvenance, TableName, save_measurements
from muxtune.support.errors import SpecError, UserError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["import_vidur"]

_COMPUTE_FILES = ("mlp.csv", "attention.csv")
_NETWORK_FILES = ("all_reduce.csv", "send_recv.csv")


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    owner: str
    """Model or topology."""


def import_vidur(folder: Path, device: str, out: Path) -> MeasurementsProvenance:
    """Read everything about one device and write it to one Parquet file.

    Args:
        folder: Vidur's ``data/profiling``, or below it ``compute``, ``network``, or the folder of a device,
            model or topology.
        device: Device whose measurements are taken; names its folder (``a40``).
        out: File, as :func:`muxtune.costs.measurements.save_measurements` writes it.

    Raises:
        UserError: Nothing of that device is there, or a file is malformed; the message names file, column
            and row.
    """
    # Reading needs pandas, which takes half a second to import.
    from profiler.vidur_tables import merge, read_attention, read_collectives, read_compute

    if not folder.is_dir():
        raise SpecError("DIR", str(folder), "a folder of Vidur's measurements, as its data/profiling")
    device = device.lower()
    found = _find(folder, device)
    parts: dict[TableName, list[pd.DataFrame]] = {}
    for file in found:
        if file.path.name == "mlp.csv":
            read = read_compute(file.path, device, file.owner)
        elif file.path.name == "attention.csv":
            read = read_attention(file.path, device, file.owner)
        else:
            read = read_collectives(file.path, file.owner)
        for name, frame in read.items():
            parts.setdefault(name, []).append(frame)
    merged = {name: merge(name, parts[name]) for name in LAYOUTS if name in parts}
    provenance = MeasurementsProvenance(
        source="Vidur, github.com/microsoft/vidur, MIT licence",
        folder=str(folder),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        files=len(found),
        rows={name: len(table.frame) for name, table in merged.items()},
        merged=sum(table.merged for table in merged.values()),
        below_resolution=sum(table.below_resolution for table in merged.values()),
        versions={"muxtune": version("muxtune")},
    )
    save_measurements({name: table.frame for name, table in merged.items()}, provenance, out)
    return provenance


def _find(folder: Path, device: str) -> list[_Found]:
    compute, network = folder / "compute", folder / "network"
    if compute.is_dir() or network.is_dir():
        found = [*_below(compute / device), *_of_network(network, device)]
    elif _has(folder, _NETWORK_FILES):
        _refuse_other_device(folder.resolve().name, device, folder)
        found = _files(folder, _NETWORK_FILES)
    elif (folder / device).is_dir():
        compute = folder
        found = _below(folder / device)
    else:
        found = [*_of_network(folder, device)]
        if not found and (found := _below(folder)):
            _refuse_other_device(_device_of(folder) or device, device, folder)
    if not found:
        devices = _names(compute) | set(map(_device_in, _names(network)))
        if devices:
            raise unknown_name(f"device in {folder}", device, devices)
        raise UserError(
            f"{folder} has no measurements of Vidur: expected {' or '.join(_COMPUTE_FILES)} below "
            f"compute/{device}, or {' or '.join(_NETWORK_FILES)} in network/{device}_*"
        )
    _refuse_same_names(found)
    return found


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()


def _of_network(network: Path, device: str) -> Iterator[_Found]:
    """Files of the device's topologies below a folder of topologies, which may be absent."""
    for name in sorted(_names(network)):
        if _device_in(name) == device:
            yield from _files(network / name, _NETWORK_FILES)


def _below(folder: Path) -> list[_Found]:
    """Files of a model, or of the models of a device, with or without their organizations."""
    patterns = [depth + name for depth in ("", "*/", "*/*/") for name in _COMPUTE_FILES]
    models = sorted({path.parent for pattern in patterns for path in folder.glob(pattern)})
    return [found for model in models for found in _files(model, _COMPUTE_FILES)]


def _device_of(folder: Path) -> str | None:
    """Device to which the folder of a device or a model belongs, where its path tells."""
    *parents, name = folder.resolve().parts
    if "compute" in parents:
        return (*parents, name)[len(parents) - parents[::-1].index("compute")]
    return name if name in device_names() else None


def _files(folder: Path, names: Sequence[str]) -> list[_Found]:
    owner = folder.resolve().name
    return [_Found(folder / name, owner) for name in names if (folder / name).is_file()]


def _has(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _refuse_other_device(name: str, device: str, folder: Path) -> None:
    found = _device_in(name)
    if found != device:
        raise SpecError("--device", device, f"{found}, whose measurements {folder} has")


def _device_in(name: str) -> str:
    """Device of a topology; a device's own name is left as it is."""
    return name.split("_", maxsplit=1)[0]


def _refuse_same_names(found: Sequence[_Found]) -> None:
    """Models are told apart by their last name, so two of one name would be mixed."""
    seen: dict[tuple[str, str], Path] = {}
    for file in found:
        other = seen.setdefault((file.owner, file.path.name), file.path)
        if other is not file.path:
            raise UserError(f"{other} and {file.path} would both be {file.owner!r}: import one at a time")
