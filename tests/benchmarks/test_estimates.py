"""The benchmark prices the same plans with a profile and with estimates, and sums up what it found."""

import pytest

import benchmarks.estimates
from benchmarks.estimates import BACKBONES, Case, compare, summary
from muxtune.costs import save_profile
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators


def fill(folder, slower=None):
    """Profiles and calibrations that follow one law; a backbone may be twice as slow as its device says."""
    (folder / "calibrations").mkdir()
    for model in BACKBONES:
        law, factor = analytic_law(model), 2.0 if model.name == slower else 1.0
        profile = make_profile(
            lambda op, phase, law=law, f=factor: f * law(op, phase), operators(model), model
        )
        save_profile(profile, folder / f"{model.name}.parquet")
        save_profile(profile, folder / "calibrations" / f"{model.name}.parquet")


@pytest.mark.slow
def test_on_one_law_estimates_are_right_and_a_slower_backbone_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.estimates, "BACKBONES", (BACKBONES[0], BACKBONES[1], BACKBONES[3]))
    fill(tmp_path, slower="gpt2-tiny")
    cases = list(compare(tmp_path, 1, 1))
    assert {(case.backbone, case.source) for case in cases} == {
        (name, source)
        for name in ("llama-tiny", "gpt2-tiny", "llama-384")
        for source in ("another backbone", "calibration")
    }
    for case in cases:
        if case.source == "calibration":
            assert case.error == pytest.approx(0, abs=1e-9)  # the same profile
            continue
        assert case.of != case.backbone
        slower = {"gpt2-tiny": 2.0}
        ratio = slower.get(case.of, 1.0) / slower.get(case.backbone, 1.0)
        assert 1 + case.error == pytest.approx(ratio, rel=0.02)


def test_mean_and_largest_are_of_amounts():
    cases = [Case("b", i, "calibration", "b", error) for i, error in enumerate((-0.1, 0.3, 0.2))]
    (found,) = summary(cases).values()
    assert (found.mean, found.largest, found.cases) == (pytest.approx(0.2), 0.3, 3)
