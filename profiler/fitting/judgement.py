"""Judgement of which measured transfers and all-reduces show the link that they are said to use.

The table has columns ``topology, collective, num_workers, devices_per_node, bytes, median_ms``, as in the
profiling data of the Vidur simulator. How its rows are read, after the source of the profiler that wrote
them, and why some are not fitted:

- A time is the median duration of NCCL's kernels on one rank, without their launch. A kernel also lasts while
  it waits for the other ranks to launch theirs. Below a few MB that is most of the time in many rows, which
  scatter between two modes (10 and 60 us on two A100), so that larger messages are often faster. The lower
  mode is the transfer. **waited**: at least three larger messages of the series took less than 0.8 of it.
- The sender's kernel ends when the message is in the receiver's buffers, not when the receiver has it. **too
  fast**: more bytes per second than the link's data sheet has in one direction; if more than a tenth of a
  series is, then nothing of the series is the time of a transfer (the A100 pairs: up to 330 of 300 GB/s).
- One rank per node: transfers between two nodes. **another path**: large messages of the series get less than
  a quarter of the data-sheet rate. The bridged A40 pair has 4.0 GB/s instead of 56 (a way through the host's
  memory, it seems), nodes of pairs have 2.2 to 2.4 GB/s (25 Gb/s Ethernet, it seems). So nothing of the A40
  is left.
- **copied**: row by row the same as of another topology. Transfers of the H100 pairs are those of the A100
  pairs; they count for the first in the alphabet, the A100.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from muxtune.costs.links import algorithm_load
from profiler.fitting.link_sources import LinkSource, Series
from profiler.fitting.table import read_table

Array = NDArray[np.float64]

COLUMNS = ("topology", "collective", "num_workers", "devices_per_node", "bytes", "median_ms")

WAITED_FACTOR = 1.25
WAITED_WITNESSES = 3
RESOLUTION_S = 1e-6
"""Times are whole microseconds."""
TOO_FAST_SHARE = 0.1
ANOTHER_PATH_SHARE = 0.25
LARGE_BYTES = 2**24
"""Sizes that show a series' rate."""


def load_rows(path: Path) -> pd.DataFrame:
    """The table, without repeated sizes, ascending within each series.

    Raises:
        UserError: Unreadable, or a column is missing.
    """
    table = read_table(path, COLUMNS)
    keys = list(COLUMNS[:-1])
    medians = table.groupby(keys)[["median_ms"]].median()
    return medians.sort_index().reset_index()


def rows_of(table: pd.DataFrame, topology: str, series: Series) -> pd.DataFrame:
    """One sweep with ``seconds``, ascending sizes."""
    chosen = (
        (table["topology"] == topology)
        & (table["collective"] == series.collective)
        & (table["num_workers"] == series.ranks)
        & (table["devices_per_node"] == series.per_node)
    )
    rows = table[chosen].reset_index(drop=True)
    return rows.assign(seconds=rows["median_ms"] * 1e-3)


def judge(table: pd.DataFrame, source: LinkSource, series: Series) -> pd.DataFrame:
    """Rows of a series with ``verdict``: why a row is not fitted, empty where it is.

    Args:
        table: Rows from :func:`load_rows`, with all topologies.
        source: The link that the rows are said to use.
        series: One of its series, or of those across it.
    """
    rows = rows_of(table, source.topology, series)
    if rows.empty:
        return rows.assign(verdict="")
    seconds, bytes_ = rows["seconds"].to_numpy(), rows["bytes"].to_numpy(float)
    rate = link_load(series) * bytes_ / seconds
    verdict = np.full(len(rows), "", dtype=object)
    verdict[_waited(seconds)] = "waited"
    if series.per_node in {1, series.ranks}:  # one link's rate bounds the series
        too_fast = rate > source.datasheet_bytes_per_s
        verdict[too_fast | (too_fast.mean() > TOO_FAST_SHARE)] = "too fast"
        large = bytes_ >= LARGE_BYTES
        if large.any() and np.median(rate[large]) < ANOTHER_PATH_SHARE * source.datasheet_bytes_per_s:
            verdict[:] = "another path"
    for topology in sorted(set(table["topology"])):
        if topology < source.topology and _same(rows, rows_of(table, topology, series)):
            verdict[:] = "copied"
    return rows.assign(verdict=verdict)


def link_load(series: Series) -> float:
    """Bytes through one rank's link, per byte of the tensor."""
    return 1.0 if series.collective == "send_recv" else algorithm_load("ring", series.ranks)


def _waited(seconds: Array) -> NDArray[np.bool_]:
    """[R] of ascending sizes, whether larger messages were clearly faster; a microsecond may be rounding."""
    waited = np.zeros(len(seconds), dtype=bool)
    for i in range(len(seconds) - WAITED_WITNESSES):
        witness = np.partition(seconds[i + 1 :], WAITED_WITNESSES - 1)[WAITED_WITNESSES - 1]
        waited[i] = seconds[i] > WAITED_FACTOR * witness + RESOLUTION_S
    return waited


def _same(rows: pd.DataFrame, others: pd.DataFrame) -> bool:
    return len(rows) == len(others) and bool(
        (rows[["bytes", "seconds"]].to_numpy() == others[["bytes", "seconds"]].to_numpy()).all()
    )
