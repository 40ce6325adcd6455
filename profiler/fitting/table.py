"""Tables of measurements that coefficients are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from muxtune.support.errors import SpecError, UserError


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a Parquet file that has some columns.

    Raises:
        UserError: Unreadable, or a column is missing.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the table {path}: {' '.join(str(error).split())}") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise SpecError(f"{path}: columns", list(table.columns), f"{', '.join(missing)} among them")
    return table
