"""Executes a plan with torch."""

from runtime.report import RunReport, load_report
from runtime.run import run_plan
from runtime.validate import ValidationReport, validate_run

__all__ = ["RunReport", "ValidationReport", "load_report", "run_plan", "validate_run"]
