"""Calibrated devices that ship with the project: coefficients, where they come from and how well they fit."""

from __future__ import annotations

from importlib.resources import files
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from muxtune.support.errors import unknown_name

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


_FOLDER = files("muxtune.data") / "devices"


def device_names() -> list[str]:
    """Devices with coefficients."""
    return sorted(entry.name for entry in _FOLDER.iterdir() if entry.is_dir())


def load_part(device: str, part: str, schema: type[T]) -> T:
    """Coefficients of one part (``gemm``, ``pointwise``, ...) of a device, ``DEVICE/PART.json``.

    Raises:
        UserError: No such device.
    """
    if device not in device_names():
        raise unknown_name("device", device, device_names())
    return schema.model_validate_json((_FOLDER / device / f"{part}.json").read_text())
