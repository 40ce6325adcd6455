"""Fits :class:`muxtune.costs.gemm.GemmCoefficients` to measured matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from muxtune.costs.devices import FitRecord
from muxtune.costs.gemm import Floats, GemmCoefficients, gemm_seconds
from muxtune.support.errors import SpecError, unknown_name

ROWS = 3000
"""Measurements that a fit looks at, evenly spread over the table; more change little but its duration."""

_INLIER = 0.03
"""Error from which on the loss grows linearly: kernels chosen against all reason are outliers."""
_RIDGE = 1.0
"""Holds the library's preferences near none where the measurements do not insist."""
_HABIT = 0.1
"""Holds the logarithms of launch and wave alike, which hardly differ where few waves run."""
_EVALUATIONS = 25
_STEP = 1e-3
COLUMNS = ("device", "model", "m", "n", "k", "median_ms")
"""Columns of a table of measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What is known before a fit; the search begins at the rates of the data sheet (dense 16-bit, memory)."""

    sm_count: int
    flops_per_s: float
    bytes_per_s: float
    k_step: int
    resident_blocks: int
    tiles: tuple[tuple[int, int], ...]
    """Tiles whose multiples show as steps in measured times."""
    splits: tuple[int, ...]


_COMMON_TILES = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))

DEVICES = {
    "a40": DeviceFacts(
        sm_count=84,
        flops_per_s=149.7e12,
        bytes_per_s=696e9,
        k_step=32,
        resident_blocks=4,
        tiles=(*_COMMON_TILES, (96, 128), (160, 128), (192, 128)),
        splits=(1, 2, 3, 4, 5, 6, 8),
    ),
    "a100": DeviceFacts(
        sm_count=108,
        flops_per_s=312e12,
        bytes_per_s=2039e9,
        k_step=32,
        resident_blocks=4,
        tiles=(*_COMMON_TILES, (192, 128), (64, 256), (256, 64)),
        splits=(1, 2, 3, 4, 5, 6, 8),
    ),
    "h100": DeviceFacts(
        sm_count=132,
        flops_per_s=989e12,
        bytes_per_s=3350e9,
        k_step=64,
        resident_blocks=1,  # warp-specialized: a block fills a multiprocessor
        tiles=(*_COMMON_TILES, (192, 128)),
        splits=(1, 2, 4),
    ),
}

# Start, least and most. Rates are relative to the data sheet, that of the L2 cache to the memory's.
_POSITIVE = {
    "launch_s": (2e-6, 1e-7, 1e-5),
    "flops_per_s": (1.0, 0.3, 2.0),
    "sustained_flops_per_s": (0.77, 0.3, 2.0),
    "idle_s": (3e-5, 1e-6, 1e-3),
    "bytes_per_s": (0.95, 0.5, 1.5),
    "l2_bytes_per_s": (5.0, 1.0, 50.0),
    "wave_s": (2e-6, 1e-8, 2e-5),
    "k_step_s": (1e-7, 1e-9, 2e-6),
    "overlap": (4.0, 1.2, 8.0),
    "exposed_store": (0.5, 0.01, 3.0),
    "split_s": (3e-6, 1e-7, 2e-5),
    "spread": (0.05, 0.01, 0.2),
}
_RELATIVE_TO = {
    "flops_per_s": "flops_per_s",
    "sustained_flops_per_s": "flops_per_s",
    "bytes_per_s": "bytes_per_s",
    "l2_bytes_per_s": "bytes_per_s",
}
_OVERHEADS = [list(_POSITIVE).index(name) for name in ("launch_s", "wave_s")]
_RELUCTANCES = ("split_reluctance", "part_wave_reluctance")
_MOST_RELUCTANT = 1.0
_RESIDENT_ELEMENTS = 128 * 256  # of fp32 sums: half of a multiprocessor's 64k registers
_NO_RECORD = FitRecord(source="", created="", command="", rows=0, error=0.0, held_out={})


def fit_gemm(table: pd.DataFrame, device: str, *, rows: int = ROWS) -> GemmCoefficients:
    """Fit to all measurements of a device in a table; the record says how well, and nothing of its origin.

    Args:
        table: Columns ``device``, ``m``, ``n``, ``k``, ``median_ms``.
        device: One of :data:`DEVICES`.
        rows: Measurements that the search looks at, at most.

    Raises:
        UserError: The device is unknown.
        SpecError: The table lacks a column, or rows of the device.
    """
    from scipy.optimize import least_squares

    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    measured = rows_of(table, device)
    shown = measured.iloc[np.linspace(0, len(measured) - 1, min(rows, len(measured))).astype(int)]
    m, n, k, measured_s = shape_columns(shown)
    search = _Search(device)

    def residuals(vector: Floats) -> Floats:
        predicted_s = gemm_seconds(search.coefficients(vector), m, n, k)
        overheads = (vector - search.start)[_OVERHEADS]
        return np.concatenate(
            [predicted_s / measured_s - 1, _RIDGE * search.preferences(vector), _HABIT * overheads]
        )

    found = least_squares(
        residuals,
        search.start,
        bounds=(search.least, search.most),
        loss="soft_l1",
        f_scale=_INLIER,
        diff_step=np.full(len(search.start), _STEP),
        max_nfev=_EVALUATIONS,
    )
    coefficients = search.coefficients(found.x)
    record = _NO_RECORD.model_copy(
        update={"rows": len(measured), "error": relative_error(coefficients, measured)}
    )
    return coefficients.model_copy(update={"fit": record})


def leave_one_model_out(table: pd.DataFrame, device: str, *, rows: int = ROWS) -> dict[str, float]:
    """Per model, the mean relative error of coefficients that were fitted to all others.

    Raises:
        UserError: See :func:`fit_gemm`.
    """
    measured = rows_of(table, device)
    errors: dict[str, float] = {}
    for model in sorted(measured["model"].unique()):
        left_out = measured["model"] == model
        errors[str(model)] = relative_error(
            fit_gemm(measured[~left_out], device, rows=rows), measured[left_out]
        )
    return errors


def relative_error(coefficients: GemmCoefficients, measured: pd.DataFrame) -> float:
    """``mean |predicted / measured - 1|``."""
    m, n, k, measured_s = shape_columns(measured)
    return float(np.abs(gemm_seconds(coefficients, m, n, k) / measured_s - 1).mean())


def rows_of(table: pd.DataFrame, device: str) -> pd.DataFrame:
    """Measurements of one device.

    Raises:
        SpecError: A column is missing, or no row is of this device.
    """
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise SpecError("table", list(table.columns), f"columns {', '.join(missing)} too")
    measured = table[table["device"] == device]
    if measured.empty:
        known = ", ".join(sorted(table["device"].astype(str).unique()))
        raise SpecError("table.device", device, f"a device of the table ({known})")
    return measured


def shape_columns(measured: pd.DataFrame) -> tuple[Floats, Floats, Floats, Floats]:
    """m, n, k and seconds."""
    m, n, k, median_ms = (measured[name].to_numpy(np.float64) for name in ("m", "n", "k", "median_ms"))
    return m, n, k, median_ms * 1e-3


class _Search:
    """Coefficients of a device as the vector that the search moves: logarithms, then preferences."""

    def __init__(self, device: str) -> None:
        self._device, self._facts = device, DEVICES[device]
        unit = [
            getattr(self._facts, _RELATIVE_TO[name]) if name in _RELATIVE_TO else 1.0 for name in _POSITIVE
        ]
        start, least, most = np.log(np.array(list(_POSITIVE.values())).T * np.array(unit))
        none = np.zeros(len(_RELUCTANCES) + len(self._facts.tiles))
        self.start = np.concatenate([start, none])
        self.least = np.concatenate([least, none - _MOST_RELUCTANT])
        self.most = np.concatenate([most, none + _MOST_RELUCTANT])

    def preferences(self, vector: Floats) -> Floats:
        """Preferences of the library, all its reluctances."""
        return vector[len(_POSITIVE) :]

    def coefficients(self, vector: Floats) -> GemmCoefficients:
        """Coefficients with an empty record."""
        facts = self._facts
        preferences = self.preferences(vector).tolist()
        return GemmCoefficients(
            device=self._device,
            sm_count=facts.sm_count,
            k_step=facts.k_step,
            resident_elements=_RESIDENT_ELEMENTS,
            resident_blocks=facts.resident_blocks,
            tiles=facts.tiles,
            splits=facts.splits,
            **dict(zip(_POSITIVE, np.exp(vector[: len(_POSITIVE)]).tolist(), strict=True)),
            **dict(zip(_RELUCTANCES, preferences, strict=False)),
            tile_reluctance=tuple(preferences[len(_RELUCTANCES) :]),
            fit=_NO_RECORD,
        )
