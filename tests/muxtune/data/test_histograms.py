"""Length histograms: values of the shipped facts, independent of the arithmetic that reads them."""

import json
from importlib.resources import files

import numpy as np
import pytest

from muxtune.data.histograms import LengthHistogram, load_length_histogram
from muxtune.support.errors import SpecError

NAMES = ("openbookqa", "rte", "sst2")


@pytest.fixture
def small() -> LengthHistogram:
    return LengthHistogram(name="small", lengths=np.array([2, 5, 9]), counts=np.array([1, 2, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_histogram_agrees_with_the_totals_recorded_beside_it(name):
    fact = json.loads(files("muxtune.data").joinpath("length_histograms.json").read_text("utf-8"))[name]
    histogram = load_length_histogram(name)
    assert histogram.name == name
    assert histogram.counts.sum() == fact["examples"]
    mean_tokens = np.average(histogram.lengths, weights=histogram.counts)
    assert mean_tokens == pytest.approx(fact["mean_tokens"], abs=0.005)  # recorded with 2 decimals
    assert (np.diff(histogram.lengths) > 0).all()
    assert (histogram.counts > 0).all()


def test_sample_follows_the_counts(small):
    drawn = small.sample(np.random.default_rng(0), 40_000)
    shares = [(drawn == length).mean() for length in small.lengths]
    # The standard error of a share is at most 0.5 / sqrt(40000) = 0.0025; four of them.
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_sample_depends_on_the_generator_alone():
    histogram = load_length_histogram("rte")
    first, again, other = (histogram.sample(np.random.default_rng(seed), 50) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_sample_of_nothing_is_empty(small):
    assert small.sample(np.random.default_rng(0), 0).shape == (0,)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        SpecError, match=r"^dataset\.lengths = 'sst3': expected one of openbookqa, rte, sst2$"
    ):
        load_length_histogram("sst3")


def test_the_note_on_the_source_is_not_a_histogram():
    with pytest.raises(SpecError, match=r"dataset\.lengths = 'source'"):
        load_length_histogram("source")


def test_shared_arrays_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        load_length_histogram("sst2").counts[0] = 0
