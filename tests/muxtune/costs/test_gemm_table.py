"""A table of matrix products with predicted times; tests/muxtune/cli/test_costs_gemm.py has the command."""

from __future__ import annotations

import pandas as pd
import pytest

from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.gemm_table import GemmPrediction, predict_gemm_table
from muxtune.support.errors import UserError


def test_every_row_gets_the_formulas_milliseconds_and_the_rest_stays(tmp_path):
    shapes = pd.DataFrame({"m": [16, 512], "n": [4096, 11008], "k": [4096, 4096], "layer": ["q", "up"]})
    shapes.assign(predicted_ms=-1.0).to_csv(tmp_path / "shapes.csv", index=False)
    summary = predict_gemm_table(tmp_path / "shapes.csv", tmp_path / "out.parquet", device="a100")
    assert summary == GemmPrediction(rows=2, model="analytic", measurements=0)
    written = pd.read_parquet(tmp_path / "out.parquet")
    expected_s = gemm_seconds(load_gemm("a100"), shapes["m"], shapes["n"], shapes["k"])
    assert written["predicted_ms"].tolist() == pytest.approx((expected_s * 1e3).tolist(), rel=1e-12)
    pd.testing.assert_frame_equal(written[["m", "n", "k", "layer"]], shapes, check_dtype=False)


def test_a_table_without_a_column_is_refused_and_nothing_written(tmp_path):
    pd.DataFrame({"m": [1], "n": [2]}).to_csv(tmp_path / "shapes.csv", index=False)
    with pytest.raises(UserError, match="k"):
        predict_gemm_table(tmp_path / "shapes.csv", tmp_path / "out.csv", device="a100")
    assert not (tmp_path / "out.csv").exists()
