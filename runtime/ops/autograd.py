"""A type that torch does not have."""

from __future__ import annotations

from typing import Any, TypeAlias

Context: TypeAlias = Any
"""First argument of an autograd function's forward and backward; the forward leaves on it what it likes."""
