"""Interpolation is exact for laws that are multilinear in the logarithms, on full and on ragged axes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.costs.interpolation import RatioTable

# (length, sequences): long ones in smaller numbers
RAGGED = [(8, 1), (8, 16), (8, 64), (128, 1), (128, 16), (1024, 1), (1024, 4)]


def law(dims):
    x, y = (math.log(size) for size in dims)
    return 0.3 - 0.1 * x + 0.05 * y + 0.02 * x * y


TABLE = RatioTable({dims: law(dims) for dims in RAGGED})


@given(st.integers(8, 1024), st.integers(1, 4))
def test_exact_inside_for_a_law_bilinear_in_the_logarithms(length, sequences):
    value, outside = TABLE.at((length, sequences))
    assert value == pytest.approx(law((length, sequences)), rel=1e-12)
    assert outside == 0.0


@pytest.mark.parametrize(
    ("dims", "edge", "factor"),
    [((4, 1), (8, 1), 2), ((2048, 1), (1024, 1), 2), ((8, 256), (8, 64), 4), ((2048, 12), (1024, 4), 3)],
)
def test_outside_the_edge_counts_and_the_distance_is_known(dims, edge, factor):
    value, outside = TABLE.at(dims)
    assert value == pytest.approx(law(edge))
    assert outside == pytest.approx(math.log(factor))


def test_a_single_point_is_its_own_edge():
    table = RatioTable({(64,): 0.5})
    assert table.at((64,)) == (0.5, 0.0)
    assert table.at((128,)) == (0.5, pytest.approx(math.log(2)))
