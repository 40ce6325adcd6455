"""Fits :class:`muxtune.costs.pointwise.PointwiseCoefficients` to measured element-wise operators.

The table has columns ``device, model, tp, op, tokens, hidden, ffn, median_ms``, as in the profiling data of
the Vidur simulator. How its rows are read, after the source of the profiler that wrote them:

- ``add`` adds twice where a model has one norm per layer (phi-2: attention, MLP and residual at once).
- ``tp`` divides the MLP's width and the heads. ``emb`` is the gather of whole rows alone; with more shards
  its table is smaller and partly cached, which makes it up to 15 % faster and is left as error.
- ``emb`` of up to 16 tokens is another kernel, one block that loops over the ids (14 us for 16 tokens, 6 for
  64). Like every row of up to 32 tokens it is not fitted: launches are most of it.
- Times are whole microseconds, so a row of 3 us may be 17 % off; rows count by what they can tell.
- Layer norm and GELU occur in one model only. When it is held out, its rows of these kinds are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from muxtune.costs.devices import FitRecord
from muxtune.costs.pointwise import PointwiseCoefficients, PointwiseKind, pointwise_seconds
from muxtune.support.errors import SpecError, unknown_name
from muxtune.support.files import write_text_atomically
from muxtune.support.tables import format_table, show_percent
from profiler.fitting.table import read_table

Array = NDArray[np.float64]

SOURCE = "profiling data of the Vidur simulator (github.com/microsoft/vidur, MIT licence), medians per shape"

MIN_TOKENS = 33
"""Smaller calls are launches."""

REPORTED_TOKENS = 129
"""Errors are those of calls that do some work."""


class Chip(NamedTuple):
    """Data-sheet numbers: what the formulas count with, and where a fit starts."""

    sm_count: int
    threads_per_sm: int
    l2_bytes: float
    bytes_per_s: float


CHIPS: dict[str, Chip] = {
    "a40": Chip(84, 1536, 6 * 2**20, 696e9),
    "a100": Chip(108, 2048, 40 * 2**20, 2039e9),
    "h100": Chip(132, 2048, 50 * 2**20, 3350e9),
}
"""NVIDIA's data sheets of A40, A100 80GB SXM and H100 SXM; threads per SM of their compute capabilities."""

HEADS: dict[str, tuple[int, int, int]] = {
    "CodeLlama-34b-Instruct-hf": (64, 8, 128),
    "Llama-2-7b-hf": (32, 32, 128),
    "Llama-2-70b-hf": (64, 8, 128),
    "Meta-Llama-3-8B": (32, 8, 128),
    "Meta-Llama-3-70B": (64, 8, 128),
    "phi-2": (32, 32, 80),
}
"""Heads, key/value heads and width of a head of the models in the table (their ``config.json``)."""

NORMS = ("input_layernorm", "post_attention_layernorm")
OPS = ("add", "emb", "attn_rope", "mlp_act", *NORMS)
COLUMNS = ("device", "model", "tp", "op", "tokens", "hidden", "ffn", "median_ms")


def load_rows(path: Path, device: str) -> pd.DataFrame:
    """Rows of a device with ``kind``, ``width``, ``kernels`` and ``measured_s``.

    Raises:
        UserError: Unreadable, a column is missing, nothing of this device, an operator or model that
            is not known here.
    """
    table = read_table(path, COLUMNS)
    rows = table[(table["device"] == device) & (table["tokens"] >= MIN_TOKENS)].reset_index(drop=True)
    if rows.empty:
        raise SpecError(f"{path}: device", sorted(set(table["device"])), f"rows of {device}")
    unknown = sorted(set(rows["op"]) - set(OPS))
    if unknown:
        raise SpecError(f"{path}: op", unknown[0], f"one of {', '.join(OPS)}")
    for model in rows["model"].unique():
        if model not in HEADS:
            raise unknown_name("model with known heads", str(model), HEADS)
    single_norm = (~rows["model"].isin(rows.loc[rows["op"] == NORMS[1], "model"])).to_numpy()
    rope_width = [
        (heads // tp + kv_heads // tp) * _touched(head_dim)
        for (heads, kv_heads, head_dim), tp in zip(rows["model"].map(HEADS), rows["tp"], strict=True)
    ]
    op = rows["op"].to_numpy()
    is_act, is_rope, is_norm = op == "mlp_act", op == "attn_rope", np.isin(op, NORMS)
    width = np.where(is_act, rows["ffn"] / rows["tp"], np.where(is_rope, rope_width, rows["hidden"]))
    # In the table a model has a single norm per layer just where it has LayerNorm and GELU.
    kind = np.select(
        [op == "add", op == "emb", is_rope, is_norm & single_norm, is_norm, is_act & single_norm, is_act],
        ["add", "gather", "rope", "layer_norm", "rms_norm", "gelu", "silu_gate"],
        default="",
    )
    return rows.assign(
        kind=kind,
        width=width,
        kernels=np.where(single_norm & (rows["op"] == "add"), 2, 1),
        measured_s=rows["median_ms"] * 1e-3,
    )


def _touched(head_dim: int) -> int:
    """Elements of a head that rotation moves: it reads halves, of 2 bytes an element, in whole sectors."""
    return 2 * (-(-head_dim // _SECTOR_BYTES) * _SECTOR_BYTES // 2)


_SECTOR_BYTES = 32


def predict(coefficients: PointwiseCoefficients, rows: pd.DataFrame) -> Array:
    """Seconds of each row."""
    seconds = np.empty(len(rows))
    for kind, group in rows.groupby("kind"):
        one = pointwise_seconds(
            coefficients, cast(PointwiseKind, kind), group["tokens"].to_numpy(), group["width"].to_numpy()
        )
        seconds[group.index.to_numpy()] = one * group["kernels"].to_numpy()
    return seconds


def errors(coefficients: PointwiseCoefficients, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that errors are reported of, with ``error``, ``|predicted / measured - 1|``."""
    error = np.abs(predict(coefficients, rows) / rows["measured_s"] - 1.0)
    return rows.assign(error=error)[rows["tokens"] >= REPORTED_TOKENS]


_ROW_KINDS = ("rope", "rms_norm", "layer_norm", "silu_gate")
_MAX_OVERLAP = 8.0
_MAX_DELAY = 4.0
_FLOOR = 1e-3
"""Smallest value of a time, in units of its start; a time may well be nothing."""
_RESOLUTION_S = 0.3e-6
"""Standard deviation of rounding to a microsecond."""
_SPREAD = 0.03
"""Relative, of a median; rows longer than about 10 us count alike."""


def fit_pointwise(rows: pd.DataFrame, device: str) -> PointwiseCoefficients:
    """Coefficients that fit best in relative terms, every operator of every model counting the same.

    Args:
        rows: Rows from :func:`load_rows`, or some of them with a fresh index.
        device: One of :data:`CHIPS`.
    """
    chip = CHIPS[device]
    rates = (0.8 * chip.bytes_per_s, 2.5 * chip.bytes_per_s, chip.l2_bytes)
    start = [1e-6, *rates, 1.5, 2.0, 1e-6, 1e-11, 1e-13, 0.5e-6, *[0.5e-6] * len(_ROW_KINDS)]
    log_start = np.log(np.array(start))
    span = np.full(len(start), -np.log(_FLOOR))
    lower, upper = log_start - span, log_start + span
    upper[1] = np.log(chip.bytes_per_s)
    lower[3:6] = np.log([chip.l2_bytes / 3, 1.0, 1.0])
    upper[3:6] = np.log([chip.l2_bytes * 2, _MAX_DELAY, _MAX_OVERLAP])
    measured_s = rows["measured_s"].to_numpy()
    alike = rows.groupby(["op", "model"])["op"].transform("size").to_numpy()
    weight = _SPREAD / np.hypot(_SPREAD, _RESOLUTION_S / measured_s) / np.sqrt(alike / alike.mean())

    def residuals(log_x: Array) -> Array:
        predicted_s = predict(_coefficients(np.exp(log_x), device), rows)
        return np.asarray(weight * np.log(predicted_s / measured_s))

    fit = least_squares(residuals, log_start, bounds=(lower, upper), loss="soft_l1", f_scale=0.05)
    return _coefficients(np.array([float(f"{value:.4g}") for value in np.exp(fit.x)]), device)


def held_out_errors(rows: pd.DataFrame, device: str) -> dict[str, float]:
    """Error of each model under a fit to the others; kinds that only it has are left out and named."""
    found: dict[str, float] = {}
    for model in sorted(rows["model"].unique()):
        others = rows[rows["model"] != model].reset_index(drop=True)
        own = rows[rows["model"] == model].reset_index(drop=True)
        only_here = sorted(set(own["kind"]) - set(others["kind"]))
        own = own[~own["kind"].isin(only_here)].reset_index(drop=True)
        name = f"{model} without {', '.join(only_here)}" if only_here else str(model)
        found[name] = float(errors(fit_pointwise(others, device), own)["error"].mean())
    return found


def main(arguments: Sequence[str]) -> None:
    """Fit a device, print its errors and write its coefficients.

    Raises:
        UserError: The table cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m profiler.fitting pointwise", description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="Parquet file with the measurements")
    parser.add_argument("--device", choices=sorted(CHIPS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the coefficients")
    options = parser.parse_args(arguments)
    rows = load_rows(options.table, options.device)
    coefficients = fit_pointwise(rows, options.device)
    reported = errors(coefficients, rows)
    record = FitRecord(
        source=SOURCE,
        created=datetime.now(UTC).date().isoformat(),
        command=f"{parser.prog} --table {options.table.name} --device {options.device} "
        f"--out {options.out.name}",
        rows=len(rows),
        error=round(float(reported["error"].mean()), 4),
        held_out={name: round(error, 4) for name, error in held_out_errors(rows, options.device).items()},
    )
    fitted = coefficients.model_copy(update={"fit": record})
    write_text_atomically(options.out, fitted.model_dump_json(indent=2) + "\n")
    by_op = reported.groupby("op")["error"].mean()
    print(format_table(("op", "error"), [(str(op), show_percent(error)) for op, error in by_op.items()]))
    print(format_table(("held out", "error"), [(n, show_percent(e)) for n, e in record.held_out.items()]))
    print(f"all: {show_percent(record.error)} of {len(reported)} rows above {REPORTED_TOKENS - 1} tokens")


_UNFITTED = FitRecord(source="", created="", command="", rows=0, error=0.0, held_out={})


def _coefficients(x: Array, device: str) -> PointwiseCoefficients:
    values = x.tolist()
    return PointwiseCoefficients(
        device=device,
        sm_count=CHIPS[device].sm_count,
        threads_per_sm=CHIPS[device].threads_per_sm,
        launch_s=values[0],
        dram_bytes_per_s=values[1],
        l2_bytes_per_s=values[2],
        l2_bytes=values[3],
        dram_delay=values[4],
        overlap=values[5],
        gather_start_s=values[6],
        gather_s=values[7],
        gelu_s=values[8],
        block_s=values[9],
        pass_s=dict(zip(_ROW_KINDS, values[10:], strict=True)),
        fit=_UNFITTED,
    )
