"""Single CSV files of the Vidur simulator as measurements (github.com/microsoft/vidur, docs/profiling.md).

Vidur times one transformer block as a worker of a tensor-parallel group runs it: columns
``time_stats.OPERATOR.STATISTIC`` in ms, beside the model's shapes and the number of workers. How it shards
the four products is in its ``vidur/profiling/mlp/mlp_impl.py``: those into the block's inside are split over
output features, those out of it over input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from muxtune.costs.measurements import LAYOUTS, TableName
from muxtune.support.errors import SpecError
from muxtune.support.user_tables import LARGEST_EXACT, UserFrame, read_frame

__all__ = ["Merged", "merge", "read_attention", "read_collectives", "read_compute"]

_POINTWISE = ("emb", "input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")
_ATTENTION = (
    *("attn_prefill", "attn_decode", "attn_kv_cache_save"),
    *("attn_input_reshape", "attn_output_reshape"),
)
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send_recv", "broadcast")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}

Sizes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """One table without repetitions."""

    frame: pd.DataFrame
    merged: int
    """Rows that repeated the keys of another."""
    below_resolution: int
    """Rows of 0 ms, which are left out."""


def read_compute(path: Path, device: str, model: str) -> dict[TableName, pd.DataFrame]:
    """``mlp.csv``: products and element-wise operators of one worker.

    Raises:
        UserError: Names file, column and row.
    """
    source = read_frame(path)
    sizes = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens", "num_tensor_parallel_workers")
    products = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    source.require((*sizes, "use_gated_mlp", *(_column(op, "median") for op in products)))
    heads, kv_heads, hidden, ffn, tokens, tp = (source.whole(name) for name in sizes)
    cells = np.array([str(cell).lower() for cell in source.frame["use_gated_mlp"]])
    source.refuse_unless(np.isin(cells, list(_TRUTH)), "use_gated_mlp", "True or False")
    gated = np.where([_TRUTH[cell] for cell in cells], 2, 1)

    head_dim = _split(source, "n_embd", hidden, heads, "the heads")
    worker_heads = _split(source, "n_head", heads, tp, "the workers")
    worker_kv_heads = _split(source, "n_kv_head", kv_heads, tp, "the workers")
    worker_ffn = _split(source, "n_expanded_embd", ffn, tp, "the workers")
    nk = {
        "attn_pre_proj": ((worker_heads + 2 * worker_kv_heads) * head_dim, hidden),
        "attn_post_proj": (hidden, worker_heads * head_dim),
        "mlp_up_proj": (gated * worker_ffn, hidden),
        "mlp_down_proj": (hidden, worker_ffn),
    }
    names = {"device": device, "model": model}
    gemm = [
        pd.DataFrame(names | {"op": op, "tp": tp, "m": tokens, "n": n, "k": k} | _times(source, op))
        for op, (n, k) in nk.items()
    ]
    common = {"tp": tp, "tokens": tokens, "hidden": hidden, "ffn": ffn}
    common |= {"heads": worker_heads, "kv_heads": worker_kv_heads, "head_dim": head_dim}
    pointwise = [
        pd.DataFrame(names | {"op": op} | common | _times(source, op, blank=True)).dropna(subset="median_ms")
        for op in _POINTWISE
        if _column(op, "median") in source.frame
    ]
    if not pointwise:
        raise _no_times(source, _POINTWISE)
    return {"gemm": pd.concat(gemm), "pointwise": pd.concat(pointwise)}


def read_attention(path: Path, device: str, model: str) -> dict[TableName, pd.DataFrame]:
    """``attention.csv``: paged attention of one worker; a decoding sequence has one query token.

    Raises:
        UserError: Names file, column and row.
    """
    source = read_frame(path)
    sizes = ("n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers", "batch_size")
    counts = ("prefill_chunk_size", "kv_cache_size")
    source.require((*sizes, *counts))
    hidden, heads, kv_heads, tp, sequences = (source.whole(name) for name in sizes)
    chunk, cached = (source.whole(name, at_least=0) for name in counts)
    common = {
        "tp": tp,
        "heads": _split(source, "n_q_head", heads, tp, "the workers"),
        "kv_heads": _split(source, "n_kv_head", kv_heads, tp, "the workers"),
        "head_dim": _split(source, "n_embd", hidden, heads, "the heads"),
        "sequences": sequences,
        "query_tokens": np.maximum(chunk, 1),
        "cached_tokens": cached,
    }
    names = {"device": device, "model": model}
    parts = [
        pd.DataFrame(names | {"op": op} | common | _times(source, op, blank=True)).dropna(subset="median_ms")
        for op in _ATTENTION
        if _column(op, "median") in source.frame
    ]
    if not parts:
        raise _no_times(source, _ATTENTION)
    return {"attention": pd.concat(parts)}


def read_collectives(path: Path, topology: str) -> dict[TableName, pd.DataFrame]:
    """``all_reduce.csv`` or ``send_recv.csv``: one collective over a range of sizes in bytes.

    Raises:
        UserError: Names file, column and row.
    """
    source = read_frame(path)
    sizes = ("num_workers", "devices_per_node")
    source.require((*sizes, "size", "collective"))
    collective = source.choice("collective", _COLLECTIVES)
    source.refuse_unless(collective == collective[0], "collective", f"{collective[0]}, as in the first row")
    source.require((_column(collective[0], "median"),))
    columns: dict[str, object] = {"topology": topology, "collective": collective}
    columns |= {name: source.whole(name) for name in sizes}
    columns["bytes"] = source.whole("size", at_most=LARGEST_EXACT)
    columns |= _times(source, str(collective[0]))
    return {"collectives": pd.DataFrame(columns)}


def merge(name: TableName, parts: list[pd.DataFrame]) -> Merged:
    """One row for each shape: median of the medians, least minimum, mean standard deviation."""
    rows = pd.concat(parts, ignore_index=True)
    timed = rows[rows["median_ms"] > 0]
    how = {"median_ms": "median", "min_ms": "min", "std_ms": "mean"}
    keys = [*LAYOUTS[name].keys, *LAYOUTS[name].optional]
    frame = timed.groupby(keys, as_index=False).agg(how)
    return Merged(frame=frame, merged=len(timed) - len(frame), below_resolution=len(rows) - len(timed))


def _times(source: UserFrame, op: str, *, blank: bool = False) -> dict[str, NDArray[np.float64]]:
    """Statistics of one operator; NaN where it did not run (``blank``) or a minor one was not recorded."""
    found = {"median_ms": source.positive(_column(op, "median"), zero=True, blank=blank)}
    for statistic in ("min", "std"):
        column = _column(op, statistic)
        recorded = column in source.frame
        found[f"{statistic}_ms"] = (
            source.positive(column, zero=True, blank=True) if recorded else np.full(len(source.frame), np.nan)
        )
    return found


def _column(op: str, statistic: str) -> str:
    return f"time_stats.{op}.{statistic}"


def _no_times(source: UserFrame, ops: Sequence[str]) -> SpecError:
    expected = f"a median of {', '.join(ops)}, as {_column(ops[0], 'median')}"
    return SpecError(f"{source.path}: columns", [str(name) for name in source.frame], expected)


def _split(source: UserFrame, column: str, total: Sizes, parts: Sizes, among: str) -> Sizes:
    source.refuse_unless(total % parts == 0, column, f"a multiple of {among}")
    return total // parts
