"""Tables of numbers in files of users (Parquet, CSV), checked so that an error names file, column and row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from muxtune.support.errors import SpecError, UserError
from muxtune.support.files import write_atomically
from muxtune.support.user_files import check_regular

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".csv")
LARGEST_DIMENSION = 2**31 - 1
"""Dimensions are 32-bit integers in the matrix libraries."""
LARGEST_EXACT = 2**53
"""Whole numbers up to here are exact in floating point, as which cells are compared."""

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class UserFrame:
    """A table as it stands in a file; columns are checked when they are asked for."""

    path: Path
    frame: pd.DataFrame
    rows: NDArray[np.intp] | None = None
    """Rows of the file that this part holds; all by default."""

    def where(self, mask: NDArray[np.bool_]) -> UserFrame:
        """The rows that ``mask`` marks; errors still name their places in the file."""
        rows = np.arange(len(self.frame)) if self.rows is None else self.rows
        return UserFrame(self.path, self.frame[mask], rows[mask])

    def require(self, columns: Sequence[str]) -> None:
        """Refuse a table that lacks a column or has it twice.

        Raises:
            SpecError: Names the file and the columns.
        """
        present = [str(name) for name in self.frame.columns]
        missing = [name for name in columns if name not in present]
        if missing:
            raise SpecError(
                f"{self.path}: columns", present, f"{', '.join(columns)}; missing: {', '.join(missing)}"
            )
        twice = [name for name in columns if present.count(name) > 1]
        if twice:
            raise SpecError(f"{self.path}: columns", present, f"each once; more often: {', '.join(twice)}")

    def whole(self, column: str, *, at_least: int = 1, at_most: int = LARGEST_DIMENSION) -> NDArray[np.int64]:
        """A column of whole numbers; ``4096.0`` is one.

        Raises:
            SpecError: Another value; the message names its row.
        """
        values = self._floats(column)
        with np.errstate(invalid="ignore"):
            fits = (values >= at_least) & (values <= at_most) & (values == np.floor(values))
        self.refuse_unless(fits, column, f"a whole number from {at_least} to {at_most}")
        return values.astype(np.int64)

    def positive(self, column: str, *, zero: bool = False, blank: bool = False) -> NDArray[np.float64]:
        """A column of finite numbers above 0.

        Args:
            column: Name of the column.
            zero: Whether 0 is allowed too.
            blank: Whether an empty cell is allowed, which becomes NaN.

        Raises:
            SpecError: Another value; the message names its row.
        """
        values = self._floats(column)
        fits = (values >= 0 if zero else values > 0) & np.isfinite(values)
        if blank:
            fits |= self.frame[column].isna().to_numpy(dtype=bool)
        self.refuse_unless(fits, column, "a number, 0 or above" if zero else "a number above 0")
        return values

    def choice(self, column: str, values: Sequence[str]) -> NDArray[np.str_]:
        """A column of names out of ``values``.

        Raises:
            SpecError: Another value; the message names its row.
        """
        names = self.names(column)
        self.refuse_unless(np.isin(names, values), column, f"one of {', '.join(values)}")
        return names

    def names(self, column: str) -> NDArray[np.str_]:
        """A column of texts that are not empty.

        Raises:
            SpecError: An empty cell; the message names its row.
        """
        cells = self.frame[column]
        known = zip(cells, cells.isna(), strict=True)
        names = np.array(["" if missing else str(cell) for cell, missing in known])
        self.refuse_unless(names != "", column, "a name")
        return names

    def refuse_unless(self, fits: NDArray[np.bool_], column: str, expected: str) -> None:
        """Refuse the first row that does not fit.

        Raises:
            SpecError: Names file, column, row and value.
        """
        import pandas as pd  # noqa: PLC0415  # half a second to import

        wrong = np.flatnonzero(~fits)
        if not len(wrong):
            return
        first, more = int(wrong[0]), len(wrong) - 1
        cell = self.frame[column].iloc[first]
        value = cell.item() if isinstance(cell, np.generic) else cell
        if value is pd.NA:
            value = None
        also = f" (and {more} more rows)" if more else ""
        raise SpecError(f"{self.path}: {column}, {self.row_name(first)}", value, expected + also)

    def row_name(self, position: int) -> str:
        """How people find a row: counted from 1, with the line of a CSV file."""
        index = position if self.rows is None else int(self.rows[position])
        if self.path.suffix.lower() != ".csv":
            return f"row {index + 1}"
        with self.path.open(encoding="utf-8") as file:
            lines = [number for number, line in enumerate(file, start=1) if line.strip()]
        return f"row {index + 1} (line {lines[index + 1]})"

    def _floats(self, column: str) -> NDArray[np.float64]:
        """NaN where a cell is no number."""
        import pandas as pd  # noqa: PLC0415  # half a second to import

        cells = self.frame[column]
        if pd.api.types.is_bool_dtype(cells.dtype):
            return np.full(len(cells), np.nan)
        if not pd.api.types.is_numeric_dtype(cells.dtype):
            cells = pd.to_numeric(cells.astype("object").map(_no_bool), errors="coerce")
        return cells.to_numpy(dtype=np.float64, na_value=np.nan)


def read_frame(path: Path) -> UserFrame:
    """Read a table with at least one row.

    Raises:
        UserError: Unsupported suffix; missing, empty or broken file; a table without rows.
    """
    check_suffix(path, str(path))
    check_regular(path, "the table")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path} is empty: expected a table")
    if start == _LFS_POINTER:
        raise UserError(f"{path} is a Git LFS pointer, not the table; git lfs pull fetches it")
    frame = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    if frame.empty:
        raise UserError(f"{path} has no rows: expected at least one")
    return UserFrame(path, frame)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a table that is whole or absent, Parquet or CSV by suffix.

    Raises:
        UserError: The place cannot be written.
    """
    write: Callable[[Path], object]
    if path.suffix.lower() == ".csv":
        write = lambda temporary: frame.to_csv(temporary, index=False)  # noqa: E731
    else:
        write = frame.to_parquet
    write_atomically(path, write)


def check_suffix(path: Path, where: str) -> None:
    """Refuse a file that is neither Parquet nor CSV by its name.

    Raises:
        SpecError: Names ``where``, an option or the file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(where, path.name, f"a name that ends with {' or '.join(SUFFIXES)}")


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd  # noqa: PLC0415  # half a second to import

    try:
        with warnings.catch_warnings():
            # A row that is longer than the header is only warned of, and cut.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, index_col=False, low_memory=False, dtype_backend="numpy_nullable")
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty: expected a table") from error
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path} is not a whole CSV file: its rows are longer than its header") from error
    except pd.errors.ParserError as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise UserError(f"{path} is not a whole CSV file: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error.reason}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd  # noqa: PLC0415  # half a second to import
    import pyarrow as pa  # noqa: PLC0415  # a tenth of a second to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        # Arrow's own types, so that a column that nobody asks about is written back as it was.
        frame: pd.DataFrame = pq.read_table(path).to_pandas(types_mapper=pd.ArrowDtype)
    except pa.ArrowInvalid as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole Parquet file: {first_line}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return frame


def _no_bool(value: object) -> object:
    return None if isinstance(value, bool | np.bool_) else value
