"""How well shipped costs are known: what they were fitted to, and their errors on tables of measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from experiments.costs.errors import row_errors
from muxtune.costs.devices import FitRecord, device_names
from muxtune.costs.gemm import load_gemm
from muxtune.costs.links import link_names, load_link
from muxtune.costs.measurements import load_measurements
from muxtune.costs.pointwise import load_pointwise
from muxtune.support.user_tables import write_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BANDS", "CostsReport", "ErrorSummary", "ShippedFit", "report_costs", "shipped_fits"]

Part = Literal["gemm", "pointwise", "collectives"]
_FROZEN = ConfigDict(frozen=True)

_TOKEN_EDGES = (128, 1024)
_BYTE_EDGES = (2**20, 2**25)
BANDS = ("small", "medium", "large")
"""Sizes up to 128 tokens or 1 MiB, up to 1024 tokens or 32 MiB, and above."""


class ShippedFit(BaseModel):
    """Coefficients that ship with the project."""

    model_config = _FROZEN

    part: Part
    name: str
    """Device, or link and device."""
    basis: str | None
    """Where numbers that no measurement gave come from."""
    fit: FitRecord | None
    """None where nothing was fitted."""


class ErrorSummary(BaseModel):
    """``|predicted / measured - 1|`` over some rows of the tables."""

    model_config = _FROZEN

    part: Part
    device: str
    """Or link, of collectives."""
    operator: str | None = None
    """None: all of them."""
    group: str | None = None
    """A model, or a series of collectives; None: all of them."""
    band: str | None = None
    """One of :data:`BANDS`; None: all sizes."""
    cost: Literal["analytic", "measured"]
    """Source of the prediction: the device model, or the interpolation between the measurements of the other
    models on top of it."""
    rows: int
    mean: float
    median: float
    p90: float


class CostsReport(BaseModel):
    """What ``muxtune costs report --json`` prints."""

    model_config = _FROZEN

    fits: tuple[ShippedFit, ...]
    errors: tuple[ErrorSummary, ...]
    """Errors by operator and size, by model, and over all."""
    notes: tuple[str, ...]
    """What was left out of the errors."""
    files: tuple[Path, ...]
    """Files that were written."""


def shipped_fits() -> Iterator[ShippedFit]:
    """Everything that ships, part by part."""
    for device in device_names():
        yield ShippedFit(part="gemm", name=device, basis=None, fit=load_gemm(device).fit)
    for device in device_names():
        yield ShippedFit(part="pointwise", name=device, basis=None, fit=load_pointwise(device).fit)
    for name in link_names():
        link = load_link(*name.rsplit("-", 1))
        yield ShippedFit(part="collectives", name=name, basis=link.basis, fit=link.fit)


def report_costs(tables: Sequence[Path] = (), out: Path | None = None) -> CostsReport:
    """What ships, and its errors on measurements.

    Args:
        tables: Measurements, see :mod:`muxtune.costs.measurements`.
        out: Folder for ``fits.csv``, and with tables ``errors.csv`` and ``errors.png``.

    Raises:
        UserError: A table cannot be read or is of an unknown device, or ``out`` cannot be written.
    """
    fits = tuple(shipped_fits())
    rows, notes = row_errors(load_measurements(tables))
    errors = tuple(_summaries(rows))
    files: list[Path] = []
    if out is not None:
        write_frame(_fit_table(fits), out / "fits.csv")
        files.append(out / "fits.csv")
    if out is not None and errors:
        import pandas as pd

        from experiments.costs.picture import draw_errors

        write_frame(pd.DataFrame([summary.model_dump() for summary in errors]), out / "errors.csv")
        draw_errors(rows, out / "errors.png")
        files += [out / "errors.csv", out / "errors.png"]
    return CostsReport(fits=fits, errors=errors, notes=tuple(notes), files=tuple(files))


def _summaries(rows: pd.DataFrame) -> Iterator[ErrorSummary]:
    """Errors over all, by model, by operator, and by operator and size."""
    if rows.empty:
        return
    banded = rows.assign(band=_bands(rows))
    fixed = ["part", "device", "cost"]
    by: tuple[list[str], ...] = ([], ["band"], ["group"], ["operator"], ["operator", "band"])
    for _, part in banded.groupby("part", sort=False):
        for extra in by:
            for key, some in part.groupby([*fixed, *extra], sort=False):
                error = some["error"]
                yield ErrorSummary.model_validate(
                    dict(zip((*fixed, *extra), map(str, key), strict=True))
                    | {"rows": len(some), "mean": error.mean()}
                    | {"median": error.median(), "p90": error.quantile(0.9)}
                )


def _bands(rows: pd.DataFrame) -> pd.Series[str]:
    import numpy as np
    import pandas as pd

    small, medium = (
        np.where(rows["part"] == "collectives", b, t) for t, b in zip(_TOKEN_EDGES, _BYTE_EDGES, strict=True)
    )
    place = np.where(rows["size"] <= small, 0, np.where(rows["size"] <= medium, 1, 2))
    return pd.Series(np.array(BANDS)[place], index=rows.index)


def _fit_table(fits: Sequence[ShippedFit]) -> pd.DataFrame:
    """A row for each error that is recorded; what was not fitted has one row without."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    for shipped in fits:
        common: dict[str, object] = {"part": shipped.part, "name": shipped.name}
        fit = shipped.fit
        errors: dict[str | None, float | None] = {None: None if fit is None else fit.error}
        if fit is not None:
            errors.update(fit.held_out)
        origin = {} if fit is None else fit.model_dump(include={"rows", "source", "created", "command"})
        for held_out, error in errors.items():
            rows.append(common | {"held_out": held_out, "error": error} | origin | {"basis": shipped.basis})
    columns = ("part", "name", "held_out", "error", "rows", "source", "created", "command", "basis")
    return pd.DataFrame(rows, columns=list(columns))
