"""Executes a plan with torch."""

from runtime.distributed.peers import PeerLostError
from runtime.engine.job import PEER_LOST_EXIT_CODE, RunOptions
from runtime.launch.run import run_plan
from runtime.reports.report import RunReport, load_report
from runtime.reports.validate import ValidationReport, validate_run

__all__ = [
    "PEER_LOST_EXIT_CODE",
    "PeerLostError",
    "RunOptions",
    "RunReport",
    "ValidationReport",
    "load_report",
    "run_plan",
    "validate_run",
]
