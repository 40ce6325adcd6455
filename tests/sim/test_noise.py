"""Noise: reproducible, unbiased, independent of who draws first."""

import numpy as np
import pytest

from muxtune.support.errors import SpecError
from sim.noise import Noise


def test_no_noise_changes_nothing():
    assert Noise().factors("stage", 0).scale((1.0, 2.0)) == (1.0, 2.0)


def test_factors_keep_the_mean_and_have_the_spread_asked_for():
    drawn = np.array(Noise(sigma=0.3, seed=5).factors("stage", 1).scale([1.0] * 200_000))
    # Four standard errors of a mean and of a standard deviation over 200,000 draws.
    assert drawn.mean() == pytest.approx(1.0, abs=4 * 0.31 / 200_000**0.5)
    assert np.log(drawn).std() == pytest.approx(0.3, abs=4 * 0.3 / 400_000**0.5)
    assert (drawn > 0).all()


def test_draws_depend_on_seed_and_actor_alone():
    def draw(seed, *actor):
        return Noise(sigma=0.1, seed=seed).factors(*actor).scale([1.0] * 4)

    assert draw(1, "stage", 0) == draw(1, "stage", 0)
    others = [draw(2, "stage", 0), draw(1, "stage", 1), draw(1, "link", 0, 1), draw(1, "link", 1, 0)]
    assert all(draw(1, "stage", 0) != other for other in others)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_a_spread_that_is_none_is_refused(sigma):
    with pytest.raises(SpecError, match=r"noise = .*: expected a finite number, at least 0"):
        Noise(sigma=sigma)


def test_a_negative_seed_is_refused():
    with pytest.raises(SpecError, match="seed = -1: expected at least 0"):
        Noise(seed=-1)
