"""Measured latencies of single operators: what ``muxtune profile import`` writes and others may bring.

A file holds one kind of measurements, told by its columns, or several with a column ``table`` that says which
row is what. Sizes are those that one worker of a tensor-parallel group sees, except ``hidden`` and ``ffn``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from muxtune.support.errors import SpecError
from muxtune.support.files import write_atomically
from muxtune.support.user_tables import LARGEST_EXACT, UserFrame, read_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LAYOUTS",
    "MeasurementsProvenance",
    "TableColumns",
    "TableName",
    "load_gemm_measurements",
    "load_measurements",
    "save_measurements",
]

TableName = Literal["gemm", "pointwise", "attention", "collectives"]
_METADATA_KEY = b"muxtune.measurements"
_TIMES = ("median_ms", "min_ms", "std_ms")
_ONE_OPERATOR = ("device", "model", "op")
_HEADS = ("heads", "kv_heads", "head_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumns:
    """Columns of one kind of measurements, beside the times."""

    names: tuple[str, ...]
    """Columns of texts."""
    sizes: tuple[str, ...]
    """Columns of whole numbers above 0, by which the kind is recognized."""
    counts: tuple[str, ...] = ()
    """Columns of whole numbers that may be 0."""
    optional: tuple[str, ...] = ()
    """Sizes that follow from the others for a given model, where they were recorded."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Everything that tells one measurement from another."""
        return (*self.names, *self.sizes, *self.counts)


LAYOUTS: Mapping[TableName, TableColumns] = {
    "gemm": TableColumns(names=_ONE_OPERATOR, sizes=("tp", "m", "n", "k")),
    "pointwise": TableColumns(names=_ONE_OPERATOR, sizes=("tp", "tokens", "hidden", "ffn"), optional=_HEADS),
    "attention": TableColumns(
        names=_ONE_OPERATOR,
        sizes=("tp", *_HEADS, "sequences", "query_tokens"),
        counts=("cached_tokens",),
    ),
    "collectives": TableColumns(
        names=("topology", "collective"), sizes=("num_workers", "devices_per_node", "bytes")
    ),
}
"""``median_ms`` is in each; ``min_ms`` and ``std_ms`` are where they were recorded."""


class MeasurementsProvenance(BaseModel):
    """Where imported measurements come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Project that published them."""
    folder: str
    """Folder that was read."""
    created_utc: str
    """ISO 8601."""
    device: str
    files: int
    rows: dict[str, int]
    """Rows of each table."""
    merged: int
    """Measurements that repeated another one's shape; each shape has the median of its medians."""
    below_resolution: int
    """Measurements of 0 ms, left out."""
    versions: dict[str, str]


def save_measurements(
    tables: Mapping[TableName, pd.DataFrame], provenance: MeasurementsProvenance, path: Path
) -> None:
    """Write all tables into one Parquet file, which is whole or absent.

    Raises:
        UserError: The place cannot be written.
    """
    import pyarrow as pa  # noqa: PLC0415  # a tenth of a second to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns = {"table": pa.string()}
    for layout in LAYOUTS.values():
        columns |= dict.fromkeys(layout.names, pa.string())
        columns |= dict.fromkeys((*layout.sizes, *layout.counts, *layout.optional), pa.int64())
    columns |= dict.fromkeys(_TIMES, pa.float64())
    schema = pa.schema(columns, metadata={_METADATA_KEY: provenance.model_dump_json().encode()})
    parts = [
        pa.table(
            {
                name: pa.array([table] * len(frame), kind)
                if name == "table"
                else pa.array(frame[name], kind, from_pandas=True)
                if name in frame
                else pa.nulls(len(frame), kind)
                for name, kind in columns.items()
            },
            schema=schema,
        )
        for table, frame in tables.items()
    ]
    whole = pa.concat_tables(parts) if parts else schema.empty_table()
    write_atomically(path, lambda temporary: pq.write_table(whole, temporary), what="the measurements")


def load_measurements(paths: Sequence[Path]) -> dict[TableName, pd.DataFrame]:
    """Read measurements of any kinds; those of one kind in several files become one table.

    Raises:
        UserError: A file cannot be read, is of no known kind, or has a wrong value.
    """
    import pandas as pd  # noqa: PLC0415  # half a second to import

    found: dict[TableName, list[pd.DataFrame]] = {}
    for path in paths:
        for name, part in _tables_in(read_frame(path)).items():
            found.setdefault(name, []).append(_checked(part, LAYOUTS[name]))
    return {name: pd.concat(found[name], ignore_index=True) for name in LAYOUTS if name in found}


def load_gemm_measurements(path: Path, device: str) -> pd.DataFrame:
    """Measured products of one device: columns ``m``, ``n``, ``k`` and ``median_ms``.

    A table without a column ``device`` is taken to be of this device.

    Raises:
        UserError: The file cannot be read, has a wrong value, or has no product of this device.
    """
    import pandas as pd  # noqa: PLC0415  # half a second to import

    source = read_frame(path)
    for column, wanted in (("table", "gemm"), ("device", device)):
        if column in source.frame:
            names = [str(cell) for cell in source.frame[column]]
            source = source.where(np.array([name.lower() == wanted for name in names], dtype=bool))
            if source.frame.empty:
                raise SpecError(f"{path}: {column}", sorted(set(names)), f"rows of {wanted!r}")
    source.require(("m", "n", "k", "median_ms"))
    sizes = {name: source.whole(name) for name in "mnk"}
    return pd.DataFrame(sizes | {"median_ms": source.positive("median_ms")})


def _tables_in(source: UserFrame) -> dict[TableName, UserFrame]:
    if "table" in source.frame:
        kinds = source.choice("table", tuple(LAYOUTS))
        return {name: source.where(kinds == name) for name in LAYOUTS if (kinds == name).any()}
    for name, layout in LAYOUTS.items():
        if set(layout.sizes) - {"tp"} <= set(source.frame):
            return {name: source}
    known = "; ".join(f"{', '.join(layout.keys)} ({name})" for name, layout in LAYOUTS.items())
    raise SpecError(f"{source.path}: columns", [str(c) for c in source.frame], f"median_ms and {known}")


def _checked(source: UserFrame, layout: TableColumns) -> pd.DataFrame:
    import pandas as pd  # noqa: PLC0415  # half a second to import

    source.require((*layout.keys, "median_ms"))
    columns: dict[str, object] = {name: source.names(name) for name in layout.names}
    columns |= {name: source.whole(name, at_most=LARGEST_EXACT) for name in layout.sizes}
    columns |= {name: source.whole(name, at_least=0) for name in layout.counts}
    for name in layout.optional:
        if name in source.frame:
            columns[name] = source.positive(name, blank=True)
    columns["median_ms"] = source.positive("median_ms")
    for name in _TIMES[1:]:
        if name in source.frame:
            columns[name] = source.positive(name, zero=True, blank=True)
    return pd.DataFrame(columns)
