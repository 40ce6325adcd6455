"""Executes a plan with torch."""

from runtime.peers import PeerLostError
from runtime.rank import PEER_LOST_EXIT_CODE
from runtime.report import RunReport, load_report
from runtime.run import run_plan
from runtime.validate import ValidationReport, validate_run

__all__ = [
    "PEER_LOST_EXIT_CODE",
    "PeerLostError",
    "RunReport",
    "ValidationReport",
    "load_report",
    "run_plan",
    "validate_run",
]
