"""The device model: its fit recovers known coefficients, and its shape is physical."""

import numpy as np
import pytest

from muxtune.costs import RooflineCosts, fit_coefficients
from muxtune.graph.operators import FWD_ONLY, PHASES, Operator
from muxtune.support.errors import UserError
from tests.muxtune.costs.synthetic import COEFFICIENTS, MODEL, analytic_law, make_profile, operators

COSTS = RooflineCosts(COEFFICIENTS, MODEL)


def test_fit_recovers_the_device_that_made_the_profile():
    fitted = fit_coefficients(make_profile(analytic_law(), operators()))
    for name in ("launch_s", "flops_per_s", "bytes_per_s", "overlap", "link_latency_s", "link_bytes_per_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(COEFFICIENTS, name), rel=0.01), name
    assert fitted.error < 1e-3


def test_fit_withstands_noise_and_outliers():
    generator = np.random.default_rng(0)
    law = analytic_law()

    def noisy(op, phase):
        return (
            law(op, phase)
            * float(np.exp(generator.normal(0, 0.03)))
            * (3 if generator.random() < 0.02 else 1)
        )

    fitted = RooflineCosts(fit_coefficients(make_profile(noisy, operators())), MODEL)
    errors = [abs(fitted.latency_s(op, "fwd") / law(op, "fwd") - 1) for op in operators() if op.kind != "p2p"]
    assert np.mean(errors) < 0.03  # the noise itself


@pytest.mark.parametrize(
    "op", [op for op in operators() if op.kind not in {"p2p", "optimizer"}][::3], ids=str
)
def test_twice_the_size_takes_longer_but_not_more_than_twice_as_long(op):
    position = 0 if op.kind == "attention" else -1
    dims = list(op.dims)
    dims[position] *= 2
    for phase in PHASES[:1] if op.kind in FWD_ONLY else PHASES:
        once_s, twice_s = COSTS.latency_s(op, phase), COSTS.latency_s(Operator(op.kind, tuple(dims)), phase)
        assert once_s < twice_s <= 2 * once_s


def test_nothing_to_do_costs_nothing():
    assert COSTS.latency_s(Operator("linear", (256, 688, 0)), "fwd") == 0.0
    assert COSTS.latency_s(Operator("attention", (0, 64)), "bwd") == 0.0
    assert COSTS.latency_s(Operator("p2p", (0,)), "fwd") == 0.0


def test_large_overlap_is_the_roofline():
    sharp = RooflineCosts(
        type(COEFFICIENTS)(
            device="cpu",
            launch_s=0.0,
            flops_per_s=1e9,
            bytes_per_s=1e9,
            overlap=1e6,
            link_latency_s=0.0,
            link_bytes_per_s=1e9,
            error=0.0,
        ),
        MODEL,
    )
    flops = 2 * 256 * 688 * 512
    assert sharp.latency_s(Operator("linear", (256, 688, 512)), "fwd") == pytest.approx(flops / 1e9, rel=1e-5)


def test_ref_names_the_device_and_follows_the_coefficients():
    assert COSTS.ref.profile_id.startswith("roofline-cpu-")
    assert COSTS.action_s(0.25, "fwd") == 0.25


def test_a_profile_without_operators_is_refused():
    with pytest.raises(UserError, match="no measured operators"):
        fit_coefficients(make_profile(lambda op, phase: 1.0, [Operator("p2p", (4096,))]))
