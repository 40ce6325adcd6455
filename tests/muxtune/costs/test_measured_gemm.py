"""A measured table on top of the model: exact on it, better beside it, and never silent far from it."""

import warnings

import numpy as np
import pytest

from muxtune.costs import ExtrapolationWarning
from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.measured_gemm import MeasuredGemm

COEFFICIENTS = load_gemm("a40")
M = [1, 16, 64, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048]
PAIRS = [(4096, 1024), (4096, 4096), (4096, 11008), (8192, 2048), (8192, 8192), (2560, 2560), (12288, 4096)]


def truth(m, n, k):
    """A device that is slower than the model by a factor that changes gently with the shape."""
    return gemm_seconds(COEFFICIENTS, m, n, k) * 1.2 * (np.asarray(n) / 4096) ** 0.1 * np.asarray(m) ** 0.02


def table_of(shapes):
    m, n, k = np.array(shapes).T
    return {"m": m, "n": n, "k": k, "median_ms": truth(m, n, k) * 1e3}


SHAPES = [(m, n, k) for n, k in PAIRS for m in M]
MEASURED = MeasuredGemm(table_of(SHAPES), COEFFICIENTS)


def test_measured_shapes_cost_what_was_measured():
    m, n, k = np.array(SHAPES).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(MEASURED.seconds(m, n, k), truth(m, n, k), rtol=1e-12)


def test_equal_shapes_cost_their_median():
    table = {"m": [8] * 4 + [16], "n": [512] * 5, "k": [512] * 5, "median_ms": [4.0, 1.0, 2.0, 9.0, 5.0]}
    assert MeasuredGemm(table, COEFFICIENTS).seconds([8, 16], 512, 512).tolist() == [3e-3, 5e-3]


@pytest.mark.parametrize("pair", [(4096, 2752), (8192, 4096), (6144, 4096)], ids=str)
def test_shapes_between_are_nearer_to_the_truth_than_the_model_is(pair):
    m = np.array([24, 96, 320, 640, 1280])
    actual = truth(m, *pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = np.abs(MEASURED.seconds(m, *pair) / actual - 1).mean()
    assert error < 0.08
    assert error < 0.5 * np.abs(gemm_seconds(COEFFICIENTS, m, *pair) / actual - 1).mean()


def test_far_away_it_is_the_scaled_model_and_says_so_once():
    measured = MeasuredGemm(table_of(SHAPES), COEFFICIENTS)
    with pytest.warns(
        ExtrapolationWarning, match=r"m=64, n=57344, k=131072 is a factor 14\.0 outside .* a40"
    ):
        far = measured.seconds(64, 57344, 131072)
    m, n, k = np.array(SHAPES).T
    ratio = np.median(truth(m, n, k) / gemm_seconds(COEFFICIENTS, m, n, k))
    assert far == pytest.approx(ratio * gemm_seconds(COEFFICIENTS, 64, 57344, 131072), rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured.seconds([1, 64], 57344, 131072)


def test_one_absurd_measurement_does_not_spoil_its_neighbours():
    table = table_of(SHAPES)
    table["median_ms"][SHAPES.index((512, 4096, 4096))] *= 50
    spoiled = MeasuredGemm(table, COEFFICIENTS).seconds(500, 4096, 4096)
    assert spoiled == pytest.approx(MEASURED.seconds(500, 4096, 4096), rel=0.5)  # and not 50 times as much
