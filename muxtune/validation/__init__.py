"""A run's trace against its plan: tables by class, stage and iteration, and what explains the difference."""

from muxtune.validation.explanation import DifferencePart, IterationExplanation, explain_difference
from muxtune.validation.measured import MeasuredRun, read_run
from muxtune.validation.tables import (
    ClassComparison,
    Comparison,
    IterationComparison,
    RunComparison,
    SlowIteration,
    StageComparison,
    compare,
    compare_run,
)

__all__ = [
    "ClassComparison",
    "Comparison",
    "DifferencePart",
    "IterationComparison",
    "IterationExplanation",
    "MeasuredRun",
    "RunComparison",
    "SlowIteration",
    "StageComparison",
    "compare",
    "compare_run",
    "explain_difference",
    "read_run",
]
