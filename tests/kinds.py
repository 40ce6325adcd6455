"""Operator kinds that suites build and profiles have."""

from muxtune import peft as _methods  # noqa: F401  # their kinds are in the table when they are loaded
from muxtune.operators import KINDS

MEASURED_KINDS = {name: kind.dims for name, kind in KINDS.items() if not kind.derived}
"""Names of the dimensions by kind."""

KINDS_WITHOUT_BIASES = {"bias"}
"""Kinds that are not measured for a backbone whose linears have no biases."""
