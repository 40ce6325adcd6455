"""A calibration is a profile, of few operators that take milliseconds each."""

from collections import Counter

import pytest

from muxtune.costs import ProfiledCosts, load_profile
from muxtune.costs.operator_work import operator_work
from muxtune.model import PRESETS
from muxtune.operators import FWD_ONLY
from profiler.calibration import calibrate, calibration_grid
from tests.profiler.test_session import SMALL

MODELS = [PRESETS[name] for name in ("llama-tiny", "gpt2-tiny", "opt-tiny", "llama2-7b", "opt-30b")]


@pytest.mark.parametrize("model", [*MODELS, SMALL], ids=lambda model: model.name)
def test_it_takes_seconds_whatever_the_backbone(model):
    grid = list(calibration_grid(model))
    assert len(grid) == len(set(grid))
    kinds = Counter(op.kind for op in grid)
    assert kinds.keys() - {"stage"} == {
        *("linear", "lora", "norm", "activation", "embedding", "attention", "head", "optimizer", "feed")
    }
    # A stage has all the operators of layers, and is left out where filling them with numbers takes long.
    assert ("stage" in kinds) == (model.hidden <= 512)
    calls = 0
    for op in grid:
        if op.kind != "stage":
            flops = max(operator_work(op, phase, model).flops for phase in ("fwd", "bwd"))
            # A head of 16 targets reads the whole vocabulary, and linears have 16 tokens at least.
            assert flops < 2e9 or op.dims[-1] <= 64
        calls += 1 if op.kind in FWD_ONLY else 2
    assert calls < 60  # of 20 ms each, with what is built and warmed up


@pytest.mark.integration
def test_it_prices_a_backbone(tmp_path):
    out = tmp_path / "calibrations" / "p.parquet"
    profile = calibrate(SMALL, ranks=2, out=out)
    assert load_profile(out) == profile
    costs = ProfiledCosts(profile, SMALL)
    assert len(costs.stages) == 6
    for m in profile.measurements:
        if m.op.kind not in {"stage", "p2p", "message"}:
            assert costs.latency_s(m.op, m.phase) > 0
    assert costs.analytic.coefficients.flops_per_s > 1e8
    assert costs.analytic.coefficients.link_latency_s > 0
