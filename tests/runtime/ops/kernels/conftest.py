"""The interpreter is started once for all tests of the kernels."""

from __future__ import annotations

import pytest

from tests.interpreter import interpreter

interpreted = pytest.fixture(scope="session")(interpreter)
