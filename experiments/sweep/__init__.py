"""Sweeps: many plans over a grid or a list of points, one row of a Parquet file for each."""

from experiments.sweep.execution import CostsSource
from experiments.sweep.inputs import PointInputs
from experiments.sweep.run import run_sweep
from experiments.sweep.specification import SweepSpec, load_sweep
from experiments.sweep.summary import SweepSummary, summary_text

__all__ = [
    "CostsSource",
    "PointInputs",
    "SweepSpec",
    "SweepSummary",
    "load_sweep",
    "run_sweep",
    "summary_text",
]
