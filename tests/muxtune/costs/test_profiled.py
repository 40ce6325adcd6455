"""Profiled costs: exact where measured, on the law in between, and never silent outside."""

import time
import warnings

import pytest

from muxtune.costs import ExtrapolationWarning, ProfiledCosts
from muxtune.graph.operators import Operator
from muxtune.model import PRESETS
from muxtune.support.errors import UserError
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators

ANALYTIC = analytic_law()


def law(op, phase):
    """The analytic law with an efficiency that is a power of the size: linear in the logarithms."""
    size = op.dims[0] if op.kind == "attention" else op.dims[-1]
    r = op.dims[2] if op.kind == "lora" else 1
    category = 1 + op.dims[1] / 1000 if op.kind == "linear" else 1
    return ANALYTIC(op, phase) * category * 0.8 * size**0.05 * r**-0.03


PROFILE = make_profile(law, operators())


@pytest.fixture
def costs():
    return ProfiledCosts(PROFILE, MODEL)


def test_measured_shapes_cost_what_was_measured(costs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m in PROFILE.measurements:
            assert costs.latency_s(m.op, m.phase) == pytest.approx(m.median_s, rel=1e-9)


@pytest.mark.parametrize(
    "op",
    [
        Operator("linear", (256, 1376, 300)),
        Operator("linear", (688, 256, 1777)),
        Operator("lora", (256, 128, 3, 100)),
        Operator("attention", (3, 100)),
        Operator("attention", (12, 200)),
        Operator("norm", (500,)),
        Operator("activation", (37,)),
        Operator("head", (5,)),
        Operator("p2p", (300_000,)),
    ],
    ids=str,
)
def test_between_measurements_the_law_is_recovered(costs, op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 5%: the fitted coefficients are not those of the law, so between points that lie factors of 4 to 16
        # apart the ratios bend a little.
        assert costs.latency_s(op, "fwd") == pytest.approx(law(op, "fwd"), rel=0.05)


def test_outside_it_warns_once_per_kind_and_says_how_far(costs):
    with pytest.warns(ExtrapolationWarning, match="norm at tokens=8192 is a factor 2.00 outside"):
        outside_s = costs.latency_s(Operator("norm", (8192,)), "fwd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs.latency_s(Operator("norm", (16384,)), "fwd")
    edge = Operator("norm", (4096,))
    growth = costs.analytic.latency_s(Operator("norm", (8192,)), "fwd") / costs.analytic.latency_s(
        edge, "fwd"
    )
    assert outside_s == pytest.approx(growth * law(edge, "fwd"))
    with pytest.warns(ExtrapolationWarning, match="attention at sequences=64,length=1024"):
        costs.latency_s(Operator("attention", (64, 1024)), "fwd")


def test_an_unmeasured_pair_takes_the_ratio_of_the_nearest(costs):
    op, near = Operator("linear", (256, 1400, 256)), Operator("linear", (256, 1376, 256))
    with pytest.warns(ExtrapolationWarning, match="linear at in_features=256,out_features=1400"):
        latency_s = costs.latency_s(op, "fwd")
    growth = costs.analytic.latency_s(op, "fwd") / costs.analytic.latency_s(near, "fwd")
    assert latency_s == pytest.approx(growth * law(near, "fwd"))


def test_nothing_to_do_costs_nothing(costs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert costs.latency_s(Operator("lora", (256, 256, 8, 0)), "fwd") == 0.0
        assert costs.latency_s(Operator("attention", (0, 64)), "fwd") == 0.0


def test_a_kind_that_was_not_measured_is_named():
    some = make_profile(law, [op for op in operators() if op.kind != "p2p"])
    with pytest.raises(UserError, match="has no fwd measurement of kind p2p"):
        ProfiledCosts(some, MODEL).latency_s(Operator("p2p", (4096,)), "fwd")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            PRESETS["gpt2-tiny"],
            r"llama-tiny \(family llama, .*\); expected one for gpt2-tiny \(family gpt2",
        ),
        (MODEL.model_copy(update={"ffn": 512}), r"\(ffn 688\); expected one for llama-tiny \(ffn 512\)"),
        (MODEL.model_copy(update={"dtype": "float64"}), r"\(dtype float32\); .* \(dtype float64\)"),
    ],
)
def test_a_profile_of_another_backbone_is_refused(model, match):
    with pytest.raises(UserError, match=match):
        ProfiledCosts(PROFILE, model)


def test_another_depth_is_the_same_backbone():
    assert ProfiledCosts(PROFILE, MODEL.model_copy(update={"layers": 2})).ref == PROFILE.ref


def test_a_repeated_question_is_answered_in_microseconds(costs):
    asked = [Operator("linear", (256, 1376, n)) for n in range(16, 1016)]
    for op in asked:
        costs.latency_s(op, "fwd")
    start_s = time.perf_counter()
    for op in asked:
        costs.latency_s(op, "fwd")
    assert (time.perf_counter() - start_s) / len(asked) < 20e-6
