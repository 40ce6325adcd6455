"""Operators: one vocabulary for measuring, pricing and executing."""

import pytest

from muxtune.graph.operators import FWD_ONLY, OPERATOR_SUITES, PHASES, Operator
from tests.kinds import MEASURED_KINDS


@pytest.mark.parametrize("kind", MEASURED_KINDS)
def test_an_operator_has_the_dimensions_of_its_kind(kind):
    dims = tuple(range(1, len(MEASURED_KINDS[kind]) + 1))
    assert str(Operator(kind, dims)) == f"{kind}{dims}"
    with pytest.raises(AssertionError):
        Operator(kind, (*dims, 1))
    with pytest.raises(AssertionError):
        Operator(kind, dims[:-1])


def test_operators_are_values():
    assert Operator("norm", (8,)) == Operator("norm", (8,))
    assert len({Operator("norm", (8,)), Operator("norm", (8,)), Operator("norm", (9,))}) == 2


def test_only_known_kinds_have_no_backward():
    assert set(MEASURED_KINDS) > FWD_ONLY
    assert PHASES == ("fwd", "bwd")


def test_the_runtime_offers_its_operators_by_entry_point():
    assert "torch" in OPERATOR_SUITES.names()
    assert callable(OPERATOR_SUITES.get("torch").build)
