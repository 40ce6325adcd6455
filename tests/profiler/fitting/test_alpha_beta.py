"""Lines are found again from the times that they make."""

import numpy as np
import pytest

from profiler.fitting.alpha_beta import fit_lines, line_seconds

BYTES = np.geomspace(2048, 2**26, 300)


def made_by(*lines):
    return line_seconds(np.array(lines), BYTES)


@pytest.mark.parametrize(
    "lines",
    [
        [(1e-5, 1e-10)],
        [(1e-5, 1e-9), (6e-5, 1e-11)],
        [(5e-6, 1e-9), (2e-5, 1e-10), (1e-4, 1e-11)],
    ],
    ids=["one", "two", "three"],
)
def test_lines_are_recovered(lines):
    fitted = fit_lines(BYTES, made_by(*lines))
    np.testing.assert_allclose(fitted, np.array(lines), rtol=0.02)


def test_noise_adds_no_lines_that_say_nothing():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.05, len(BYTES)))
    fitted = fit_lines(BYTES, made_by((2e-5, 5e-11)) * noise)
    assert len(fitted) == 1
    np.testing.assert_allclose(fitted[0], (2e-5, 5e-11), rtol=0.03)


def test_a_few_outliers_do_not_bend_a_line():
    seconds = made_by((2e-5, 5e-11))
    seconds[::20] *= 3
    fitted = line_seconds(fit_lines(BYTES, seconds), BYTES)
    assert np.median(np.abs(fitted / made_by((2e-5, 5e-11)) - 1)) < 0.03


def test_no_line_is_faster_than_allowed():
    fitted = fit_lines(BYTES, made_by((1e-5, 1e-11)), least_s_per_byte=2e-11)
    assert (fitted[:, 1] >= 2e-11 * (1 - 1e-6)).all()


def test_no_line_starts_where_nothing_was_measured():
    large = BYTES[BYTES > 2**20]
    seconds = 1e-6 + large * 1e-10
    fitted = fit_lines(large, seconds)
    assert fitted[:, 0].min() >= 0.5 * seconds.min() * (1 - 1e-6)
