"""The fit finds the device behind a table, and its errors on models left out stay under the bars."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from muxtune.costs.gemm import GemmCoefficients, gemm_seconds, load_gemm
from muxtune.support.errors import SpecError, UserError
from profiler.fitting.__main__ import main
from profiler.fitting.gemm import fit_gemm, leave_one_model_out
from profiler.fitting.gemm_evaluation import left_out_errors

TABLE = Path(__file__).parents[4] / "shared/data/gpu_measurements/gemm.parquet"
needs_table = pytest.mark.skipif(not TABLE.exists(), reason=f"no measurements at {TABLE}")
M = [1, 8, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
PAIRS = {
    "small": [(2560, 2560), (10240, 2560), (2560, 10240), (7680, 2560)],
    "middle": [(4096, 512), (4096, 4096), (12288, 4096), (4096, 11008), (1536, 4096)],
    "large": [(8192, 1024), (8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672), (1280, 8192)],
}


def synthetic(coefficients, noise=0.0):
    rows = [(model, m, n, k) for model, pairs in PAIRS.items() for n, k in pairs for m in M]
    table = pd.DataFrame(rows, columns=["model", "m", "n", "k"])
    factor = np.exp(noise * np.random.default_rng(0).standard_normal(len(table)))
    seconds = gemm_seconds(coefficients, table["m"], table["n"], table["k"])
    return table.assign(device=coefficients.device, median_ms=seconds * factor * 1e3)


@pytest.fixture(scope="module")
def slower():
    """A device like the H100, but with other rates."""
    return load_gemm("h100").model_copy(
        update={"flops_per_s": 700e12, "bytes_per_s": 2.2e12, "launch_s": 5e-6, "overlap": 3.0}
    )


def test_fit_recovers_what_made_the_table(slower):
    fitted = fit_gemm(synthetic(slower, noise=0.01), "h100")
    assert fitted.fit.error < 0.02  # the noise, and what 25 evaluations leave
    assert fitted.flops_per_s == pytest.approx(slower.flops_per_s, rel=0.08)
    assert fitted.bytes_per_s == pytest.approx(slower.bytes_per_s, rel=0.08)
    assert fitted.launch_s == pytest.approx(slower.launch_s, rel=0.25)


def test_a_model_left_out_is_predicted_by_the_others(slower):
    errors = leave_one_model_out(synthetic(slower), "h100")
    assert set(errors) == set(PAIRS)
    assert max(errors.values()) < 0.04


@pytest.mark.filterwarnings("ignore::muxtune.costs.ExtrapolationWarning")
@pytest.mark.parametrize(("by", "value"), [("model", "small"), ("k", 2560)])
def test_what_is_left_out_has_no_part_in_its_prediction(slower, by, value):
    table = synthetic(slower)
    own = table.index[table[by] == value]
    honest = left_out_errors(table, "h100", by=by, rows=100).loc[own]
    table.loc[own, "median_ms"] *= 3
    spoiled = left_out_errors(table, "h100", by=by, rows=100).loc[own]
    for kind in ("analytic", "measured"):  # the same predictions, against thrice the time
        np.testing.assert_allclose(3 * (spoiled[kind] + 1), honest[kind] + 1, rtol=1e-9)


def test_command_writes_coefficients_with_their_origin(slower, tmp_path, capsys):
    synthetic(slower).to_parquet(tmp_path / "T.parquet")
    out = tmp_path / "gemm.json"
    main(["gemm", "--table", str(tmp_path / "T.parquet"), "--device", "h100", "--out", str(out)])
    written = GemmCoefficients.model_validate_json(out.read_text())
    assert written.fit.command == (
        "python -m profiler.fitting gemm --table T.parquet --device h100 --out gemm.json"
    )
    assert set(written.fit.held_out) == set(PAIRS)
    assert f"error {written.fit.error:.4f}" in capsys.readouterr().out


def test_what_cannot_be_fitted_is_said(slower, tmp_path):
    table = synthetic(slower)
    with pytest.raises(UserError, match="no device named 'h200'; did you mean 'h100'"):
        fit_gemm(table, "h200")
    with pytest.raises(SpecError, match=r"table.device = 'a40': expected a device of the table \(h100\)"):
        fit_gemm(table, "a40")
    with pytest.raises(SpecError, match="expected columns k, median_ms too"):
        fit_gemm(table.drop(columns=["k", "median_ms"]), "h100")
    with pytest.raises(UserError, match=r"absent\.parquet"):
        main(["gemm", "--table", str(tmp_path / "absent.parquet"), "--device", "h100", "--evaluate"])
    with pytest.raises(UserError, match="no part named 'gem'; did you mean 'gemm'"):
        main(["gem"])


@pytest.mark.slow
@needs_table
@pytest.mark.parametrize(
    ("device", "analytic", "measured"), [("a40", 0.07, 0.047), ("a100", 0.06, 0.04), ("h100", 0.07, 0.045)]
)
def test_models_left_out_are_predicted_within_the_bars(device, analytic, measured):
    """On every third m, with short fits; ``python -m profiler.fitting gemm --evaluate`` has all.

    The aim of the measured model is 4.5 %. On a40 it stays above: no product of Llama-2-7b or phi-2 is
    among those of the few other models, and which kernel the library takes for them is a guess.
    """
    table = pd.read_parquet(TABLE)
    m_values = np.sort(table["m"].unique())
    errors = left_out_errors(table[table["m"].isin(m_values[::3])], device, rows=1000)
    per_model = errors[["analytic", "measured"]].abs().groupby(errors["model"]).mean()
    assert per_model["analytic"].mean() < analytic
    assert per_model["measured"].mean() < measured


@needs_table
@pytest.mark.parametrize("device", ["a40", "a100", "h100"])
def test_shipped_coefficients_have_the_error_that_they_state(device):
    measured = pd.read_parquet(TABLE).query("device == @device")
    c = load_gemm(device)
    predicted_ms = gemm_seconds(c, measured["m"], measured["n"], measured["k"]) * 1e3
    assert np.abs(predicted_ms / measured["median_ms"] - 1).mean() == pytest.approx(c.fit.error, rel=1e-6)
    assert c.fit.rows == len(measured)
