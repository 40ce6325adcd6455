"""Predicted times for a table of matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.measured_gemm import MeasuredGemm
from muxtune.costs.measurements import load_gemm_measurements
from muxtune.support.user_tables import read_frame, write_frame

__all__ = ["GemmPrediction", "predict_gemm_table"]

PREDICTED = "predicted_ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPrediction:
    """Summary of the table that was written."""

    rows: int
    model: Literal["analytic", "measured"]
    """``measured``: interpolated between measurements, on top of the analytic shape."""
    measurements: int


def predict_gemm_table(shapes: Path, out: Path, *, device: str, table: Path | None = None) -> GemmPrediction:
    """Copy a table with columns ``m``, ``n``, ``k``, with ``predicted_ms`` added (or replaced).

    Args:
        shapes: Parquet or CSV, by suffix.
        out: Where the copy goes; Parquet or CSV, by suffix.
        device: One whose coefficients ship with the project.
        table: Measured products of this device, which refine the prediction.

    Raises:
        UserError: Unknown device, a file that cannot be read or written, or a wrong value; the message names
            its row.
    """
    coefficients = load_gemm(device)
    source = read_frame(shapes)
    source.require(("m", "n", "k"))
    m, n, k = (source.whole(name) for name in "mnk")
    measured = None if table is None else load_gemm_measurements(table, device)
    if measured is None:
        predicted_s = gemm_seconds(coefficients, m, n, k)
    else:
        columns = {name: measured[name].to_numpy() for name in measured.columns}
        predicted_s = MeasuredGemm(columns, coefficients).seconds(m, n, k)
    write_frame(source.frame.assign(**{PREDICTED: predicted_s * 1e3}), out)
    return GemmPrediction(
        rows=len(m),
        model="analytic" if measured is None else "measured",
        measurements=0 if measured is None else len(measured),
    )
