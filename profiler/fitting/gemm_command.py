"""``python -m profiler.fitting gemm --table T.parquet --device a40 --out FILE``: fit, and write coefficients.

With ``--evaluate`` instead of ``--out``: print the errors on models (``--by k``, ``--by n``: on all products
of one size) that were left out.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from muxtune.support.errors import UserError
from muxtune.support.files import write_text_atomically
from profiler.fitting.gemm import COLUMNS, DEVICES, fit_gemm, leave_one_model_out
from profiler.fitting.gemm_evaluation import Split, evaluation_table


def main(arguments: Sequence[str]) -> None:
    """Command ``python -m profiler.fitting gemm``.

    Raises:
        UserError: The table cannot be read or lacks what is needed, or the device is unknown.
    """
    parser = argparse.ArgumentParser(prog="python -m profiler.fitting gemm", description=__doc__)
    parser.add_argument(
        "--table", type=Path, required=True, help=f"Parquet with columns {', '.join(COLUMNS)}"
    )
    parser.add_argument("--device", required=True, help=", ".join(DEVICES))
    parser.add_argument("--source", default="", help="where the measurements come from, and their licence")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="JSON file of the coefficients")
    what.add_argument("--evaluate", action="store_true", help="print errors on models left out")
    parser.add_argument(
        "--by", choices=get_args(Split), default="model", help="what --evaluate leaves out (model)"
    )
    options = parser.parse_args(arguments)
    try:
        table = pd.read_parquet(options.table)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"{options.table} is no Parquet table: {reason}") from None
    if options.evaluate:
        print(evaluation_table(table, options.device, by=options.by))
        return
    coefficients = fit_gemm(table, options.device)
    record = coefficients.fit.model_copy(
        update={
            "source": options.source or options.table.name,
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": "python -m profiler.fitting gemm "
            f"--table {options.table.name} --device {options.device} --out {options.out.name}",
            "held_out": leave_one_model_out(table, options.device),
        }
    )
    write_text_atomically(
        options.out, coefficients.model_copy(update={"fit": record}).model_dump_json(indent=1) + "\n"
    )
    left_out = np.mean(list(record.held_out.values()))
    print(f"{options.out}: error {record.error:.4f}, on models left out {left_out:.4f}")
