"""How well costs of matrix products hold on what nothing was fitted to, analytic and measured.

Left out are models, as a user meets them; or all products of one k (or n), of which not one shape is known,
while two models can have shapes in common.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from muxtune.costs.gemm import gemm_seconds
from muxtune.costs.measured_gemm import MeasuredGemm
from muxtune.support.tables import format_table, show_percent
from profiler.fitting.gemm import ROWS, fit_gemm, rows_of, shape_columns

Split = Literal["model", "k", "n"]

_M_EDGES = (1, 17, 65, 129, 257, 513, 1025, 2049)
"""First m of each range that errors are shown for."""


def left_out_errors(
    table: pd.DataFrame, device: str, *, by: Split = "model", rows: int = ROWS
) -> pd.DataFrame:
    """Every row of a device, predicted by what was fitted to the other models alone.

    Args:
        table: Measurements for :func:`profiler.fitting.gemm.fit_gemm`, with a column ``model``.
        device: Device whose rows are predicted.
        by: Column whose values are left out, one at a time.
        rows: Measurements that each fit looks at, at most; see :func:`profiler.fitting.gemm.fit_gemm`.

    Returns:
        The rows with columns ``analytic`` and ``measured``: relative errors ``predicted / measured - 1`` of
        :func:`muxtune.costs.gemm.gemm_seconds` and :class:`muxtune.costs.measured_gemm.MeasuredGemm`.

    Raises:
        UserError: See :func:`profiler.fitting.gemm.fit_gemm`.
    """
    of_device = rows_of(table, device)
    parts = []
    for value in sorted(of_device[by].unique()):
        others, left_out = of_device[of_device[by] != value], of_device[of_device[by] == value]
        coefficients = fit_gemm(others, device, rows=rows)
        m, n, k, measured_s = shape_columns(left_out)
        on_top = MeasuredGemm(
            {name: others[name].to_numpy() for name in ("m", "n", "k", "median_ms")}, coefficients
        )
        parts.append(
            left_out.assign(
                analytic=gemm_seconds(coefficients, m, n, k) / measured_s - 1,
                measured=on_top.seconds(m, n, k) / measured_s - 1,
            )
        )
    errors: pd.DataFrame = pd.concat(parts)
    return errors


def evaluation_table(table: pd.DataFrame, device: str, *, by: Split = "model", rows: int = ROWS) -> str:
    """Mean relative errors per value left out and per range of m, as text."""
    errors = left_out_errors(table, device, by=by, rows=rows)
    kinds = ["analytic", "measured"]
    absolute = errors.assign(**{kind: errors[kind].abs() for kind in kinds})
    per_value = absolute.groupby(by)[kinds].mean()
    starts = np.array(_M_EDGES)
    first_m = starts[np.searchsorted(starts, absolute["m"].to_numpy(), side="right") - 1]
    per_range = absolute.groupby(first_m)[kinds].mean()
    cells = [
        [str(value) if by == "model" else f"{by} = {value}", *map(show_percent, row)]
        for value, row in zip(per_value.index, per_value.to_numpy(), strict=True)
    ]
    cells.append([f"mean of the {by}s", *map(show_percent, per_value.mean())])
    cells.append(["mean of all rows", *map(show_percent, absolute[kinds].mean())])
    cells += [
        [f"m from {first}", *map(show_percent, row)]
        for first, row in zip(per_range.index, per_range.to_numpy(), strict=True)
    ]
    return format_table([f"{device}, left out", *kinds], cells)
