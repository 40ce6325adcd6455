"""A measured table on top of the model: exact on it, better beside it, and never silent far from it."""

import warnings

import numpy as np
import pytest

from muxtune.costs import ExtrapolationWarning
from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.measured_gemm import MeasuredGemm, _is_down_projection

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


# Width, MLP width, outputs of the attention's first product (query, keys, values), whether the MLP is gated
LLAMA2_7B, LLAMA3_8B = (4096, 11008, 12288), (4096, 14336, 6144)
LLAMA2_70B, INTERNLM_20B = (8192, 28672, 10240), (5120, 13824, 15360)


@pytest.mark.parametrize("model", [LLAMA2_7B, LLAMA3_8B, LLAMA2_70B, INTERNLM_20B], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_down_projections_are_told_from_the_other_products_of_a_layer(model, ranks):
    width, mlp, attention = model
    others = [(1, attention // ranks, width), (1, width, width // ranks), (1, 2 * mlp // ranks, width)]
    assert _is_down_projection(np.array([*others, (1, width, mlp // ranks)], float)).tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_what_down_projections_share_reaches_those_of_another_model_and_no_other_product():
    shapes = [(m, n, k) for n, k in [*PAIRS, (8192, 3584), (8192, 7168), (4096, 2752)] for m in M]
    even, faster = table_of(shapes), table_of(shapes)
    down = _is_down_projection(np.array(shapes, float))
    faster["median_ms"] = np.where(down, 0.9, 1.0) * faster["median_ms"]
    m, measured = np.array([300, 900, 1800]), [MeasuredGemm(table, COEFFICIENTS) for table in (even, faster)]
    for (n, k), change in {(5120, 6912): 0.9, (5120, 5120): 1.0}.items():
        before_s, after_s = (costs.seconds(m, n, k) for costs in measured)
        np.testing.assert_allclose(after_s / before_s, change, atol=0.03)
