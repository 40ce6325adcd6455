"""Errors of the shipped device models on tables of measurements, row by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from muxtune.costs.devices import device_names
from muxtune.costs.gemm import GemmCoefficients, gemm_seconds, load_gemm
from muxtune.costs.links import load_link
from muxtune.costs.measured_gemm import MeasuredGemm
from muxtune.costs.measurements import TableName
from muxtune.costs.pointwise import load_pointwise
from muxtune.costs.profiled import ExtrapolationWarning
from muxtune.support.errors import unknown_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ANALYTIC", "MEASURED", "ROW_COLUMNS", "row_errors"]

ANALYTIC = "analytic"
"""The device model with the shipped coefficients."""

MEASURED = "measured"
"""Interpolated between the measurements of the other models of the table, on top of the device model."""

ROW_COLUMNS = ("part", "device", "operator", "group", "size", "cost", "error")
"""``device`` is a link for collectives. ``group`` is what can be left out: a model, or a series.
``size`` is in tokens, for collectives in bytes. ``error`` is ``|predicted / measured - 1|``."""


def row_errors(tables: Mapping[TableName, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Every measurement with the error of each way to price it, and notes on what was left out.

    Args:
        tables: Tables from :func:`muxtune.costs.measurements.load_measurements`.

    Returns:
        A table with :data:`ROW_COLUMNS`, and sentences.

    Raises:
        UserError: A device has no coefficients.
    """
    import pandas as pd

    parts: dict[TableName, Callable[[pd.DataFrame, list[str]], list[pd.DataFrame]]] = {
        "gemm": _gemm,
        "pointwise": _pointwise,
        "collectives": _collectives,
    }
    notes: list[str] = []
    found: list[pd.DataFrame] = []
    for name, table in tables.items():
        if name not in parts:
            notes.append(f"{name}: {len(table):,} rows, of paged kernels that training does not run")
            continue
        for rows in parts[name](table, notes):
            found.append(rows.assign(part=name)[list(ROW_COLUMNS)])
    if not found:
        return pd.DataFrame({column: [] for column in ROW_COLUMNS}), notes
    return pd.concat(found, ignore_index=True), notes


def _gemm(table: pd.DataFrame, notes: list[str]) -> list[pd.DataFrame]:
    found = []
    for device, rows in _by_device(table):
        c = load_gemm(device)
        sizes = [rows[name].to_numpy() for name in "mnk"]
        named = rows.rename(columns={"op": "operator", "model": "group", "m": "size"})
        analytic = _relative(gemm_seconds(c, *sizes), rows)
        found.append(named.assign(cost=ANALYTIC, error=analytic))
        if rows["model"].nunique() == 1:
            notes.append(f"gemm, {device}: one model alone, so none can be left out")
            continue
        found.append(named.assign(cost=MEASURED, error=_relative(_left_out(rows, c), rows)))
    return found


def _left_out(rows: pd.DataFrame, coefficients: GemmCoefficients) -> NDArray[np.float64]:
    """Seconds of each row out of the measurements of the other models."""
    seconds = np.empty(len(rows))
    models = rows["model"].to_numpy()
    columns = {name: rows[name].to_numpy() for name in ("m", "n", "k", "median_ms")}
    for model in np.unique(models):
        own = models == model
        others = {name: values[~own] for name, values in columns.items()}
        measured = MeasuredGemm(others, coefficients)
        with warnings.catch_warnings():
            # How far the others are away is part of what the error tells.
            warnings.simplefilter("ignore", ExtrapolationWarning)
            seconds[own] = measured.seconds(*(columns[name][own] for name in "mnk"))
    return seconds


def _pointwise(table: pd.DataFrame, notes: list[str]) -> list[pd.DataFrame]:
    from profiler.fitting.pointwise import HEADS, MIN_TOKENS, OPS, load_rows, predict

    known = table["model"].isin(HEADS)
    if not known.all():
        models = ", ".join(sorted(set(table.loc[~known, "model"])))
        notes.append(f"pointwise: {(~known).sum():,} rows of {models}, whose heads are not known")
    modelled = table["op"].isin(OPS)
    if not modelled.all():
        operators = ", ".join(sorted(set(table.loc[~modelled, "op"])))
        notes.append(f"pointwise: {(~modelled).sum():,} rows of {operators}, which no device model has")
    short = int((table["tokens"] < MIN_TOKENS).sum())
    if short:
        notes.append(f"pointwise: {short:,} rows below {MIN_TOKENS} tokens, which are launches")
    found = []
    with TemporaryDirectory() as folder:
        for device, rows in _by_device(table[known & modelled & (table["tokens"] >= MIN_TOKENS)]):
            path = Path(folder) / f"{device}.parquet"
            rows.to_parquet(path)
            read = load_rows(path, device)
            error = _relative(predict(load_pointwise(device), read), read)
            named = read.rename(columns={"op": "operator", "model": "group", "tokens": "size"})
            found.append(named.assign(cost=ANALYTIC, error=error))
    return found


def _collectives(table: pd.DataFrame, notes: list[str]) -> list[pd.DataFrame]:
    from profiler.fitting.collectives import with_errors
    from profiler.fitting.judgement import COLUMNS, judge
    from profiler.fitting.link_sources import SOURCES

    *keys, time = COLUMNS
    merged = table.groupby(keys)[time].median().reset_index()  # one row per size, ascending
    unknown = sorted(set(merged["topology"]) - {source.topology for source in SOURCES.values()})
    if unknown:
        notes.append(f"collectives: no link is known for {', '.join(unknown)}")
    found = []
    for source in SOURCES.values():
        link = load_link(source.link, source.device)
        inside = None
        if source.inside is not None:
            inside = load_link(SOURCES[source.inside].link, SOURCES[source.inside].device)
        judged = [judge(merged, source, series) for series in (*source.series, *source.across)]
        for rows in judged:
            usable = rows[rows["verdict"] == ""].reset_index(drop=True)
            reasons = rows.loc[rows["verdict"] != "", "verdict"].value_counts()
            if len(reasons):
                first = rows.iloc[0]
                why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
                notes.append(
                    f"{source.name}, {first['collective']} of {first['num_workers']} ranks, "
                    f"{first['devices_per_node']} per node: {why}"
                )
            if usable.empty:
                continue
            one = usable.iloc[0]
            group = f"{one['collective']}, {one['num_workers']} ranks, {one['devices_per_node']} per node"
            named = with_errors(link, usable, inside)
            named = named.rename(columns={"collective": "operator", "bytes": "size"})
            found.append(named.assign(device=source.name, group=group, cost=ANALYTIC))
    return found


def _by_device(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    for device in sorted(set(table["device"])):
        if device not in device_names():
            raise unknown_name("device with coefficients", device, device_names())
    return [(str(device), rows.reset_index(drop=True)) for device, rows in table.groupby("device")]


def _relative(seconds: NDArray[np.float64], rows: pd.DataFrame) -> NDArray[np.float64]:
    return np.abs(seconds / (rows["median_ms"].to_numpy() * 1e-3) - 1.0)
