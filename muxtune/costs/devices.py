"""Calibrated devices, as data: coefficients, where they come from and how well they fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from muxtune.support.errors import SpecError, UserError, spec_error_from, unknown_name

T = TypeVar("T", bound=BaseModel)


class FitRecord(BaseModel):
    """Where coefficients come from. Errors are mean relative errors, ``mean |predicted / measured - 1|``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """The measurements, and their licence."""
    created: str
    """Date, ISO 8601."""
    command: str
    """Command that fitted them."""
    rows: int
    """Measurements that were fitted to."""
    error: float
    """Mean error over all of them."""
    held_out: dict[str, float]
    """Error of each group of rows (a model, say) under coefficients that were fitted to the others."""


DEVICES_VARIABLE = "MUXTUNE_DEVICES"
"""Environment variable with folders of one's own devices, which come before those that ship."""


def device_names() -> list[str]:
    """Devices with coefficients: those that ship, and those of :data:`DEVICES_VARIABLE`."""
    return sorted({entry.name for folder in _folders() for entry in folder.iterdir() if entry.is_dir()})


def load_part(device: str, part: str, schema: type[T]) -> T:
    """Coefficients of one part (``gemm``, ``pointwise``, ``device``) of a device, ``DEVICE/PART.json``.

    Raises:
        UserError: No such device, or a part of it is missing or wrong.
    """
    for folder in _folders():
        place = folder / device
        if device and place.is_dir():
            name = f"{place / part}.json"
            try:
                return schema.model_validate_json((place / f"{part}.json").read_text())
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror or error}") from error
            except ValidationError as error:
                raise spec_error_from(error, name) from error
    raise unknown_name("device", device, device_names())


def has_part(device: str, part: str) -> bool:
    """Whether the folder of a device has a file ``PART.json``."""
    return any((folder / device / f"{part}.json").is_file() for folder in _folders())


def _folders() -> Iterator[Traversable]:
    for name in os.environ.get(DEVICES_VARIABLE, "").split(os.pathsep):
        if name:
            if not Path(name).is_dir():
                raise SpecError(DEVICES_VARIABLE, name, "a folder with a folder for each device")
            yield Path(name)
    yield files("muxtune.data") / "devices"
