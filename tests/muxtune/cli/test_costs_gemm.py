from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.measured_gemm import MeasuredGemm

SHAPES = pd.DataFrame(
    {"layer": ["a", "b", "a"], "m": [64, 4096, 64], "n": [4096, 12288, 4096], "k": [4096, 512, 4096]}
)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes | str):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif path.suffix == ".csv":
            content.to_csv(path, index=False)
        else:
            content.to_parquet(path)
        return path

    return write


def read(path):
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


@pytest.mark.parametrize("source", [".parquet", ".csv"])
@pytest.mark.parametrize("target", [".parquet", ".csv"])
@pytest.mark.parametrize("device", ["a40", "a100", "h100"])
def test_the_table_comes_back_with_predictions(cli, write, tmp_path, device, source, target):
    out = tmp_path / f"out{target}"
    result = cli("costs", "gemm", "--device", device, "--shapes", write(f"s{source}", SHAPES), "--out", out)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out}: 3 products on {device}, predicted by the device model in ")
    table = read(out)
    assert list(table) == ["layer", "m", "n", "k", "predicted_ms"]
    pd.testing.assert_frame_equal(table[list(SHAPES)], SHAPES, check_dtype=False)
    expected_s = gemm_seconds(load_gemm(device), *(SHAPES[name].to_numpy() for name in "mnk"))
    np.testing.assert_allclose(table["predicted_ms"], expected_s * 1e3, rtol=1e-12)


def test_json_is_one_object(cli, write, tmp_path):
    out = tmp_path / "out.csv"
    result = cli(
        "costs", "gemm", "--device", "h100", "--shapes", write("s.csv", SHAPES), "--out", out, "--json"
    )
    assert result.json.pop("seconds") > 0
    expected = {"rows": 3, "device": "h100", "out": str(out), "model": "analytic", "measurements": 0}
    assert {name: value for name, value in result.json.items() if name != "seconds"} == expected
    assert result.err == ""


def test_measurements_refine_the_prediction(cli, write, tmp_path):
    c = load_gemm("a40")
    grid = np.array([(m, n, k) for m in (32, 256, 2048) for n, k in ((4096, 4096), (1024, 8192))])
    slow_ms = 1.5e3 * gemm_seconds(c, *grid.T)
    table = pd.DataFrame(grid, columns=["m", "n", "k"]).assign(median_ms=slow_ms, device="a40")
    other = table.assign(device="h100", median_ms=99.0)
    shapes = write("s.csv", pd.DataFrame({"m": [256], "n": [4096], "k": [4096]}))
    path, out = write("t.parquet", pd.concat([table, other])), tmp_path / "out.csv"
    result = cli(
        "costs", "gemm", "--device", "a40", "--shapes", shapes, "--out", out, "--table", path, "--json"
    )
    assert result.code == 0, result.err
    assert (result.json["model"], result.json["measurements"]) == ("measured", 6)
    columns = {name: table[name].to_numpy() for name in ("m", "n", "k", "median_ms")}
    expected_s = MeasuredGemm(columns, c).seconds(np.array([256]), np.array([4096]), np.array([4096]))
    predicted_ms = read(out)["predicted_ms"].to_numpy()
    np.testing.assert_allclose(predicted_ms, expected_s * 1e3, rtol=1e-12)
    assert predicted_ms == pytest.approx(1.5e3 * gemm_seconds(c, [256], [4096], [4096]), rel=0.1)


def test_a_prediction_from_before_is_replaced_in_place(cli, write):
    path = write("s.csv", SHAPES.assign(predicted_ms=-1.0))
    assert cli("costs", "gemm", "--device", "a40", "--shapes", path, "--out", path).code == 0
    assert list(read(path)) == [*SHAPES, "predicted_ms"]
    assert (read(path)["predicted_ms"] > 0).all()


def test_columns_of_any_type_are_kept(cli, tmp_path):
    columns = {
        "m": [1, 2],
        "n": [3, 4],
        "k": [5, 6],
        "count": pa.array([None, 7], pa.int16()),
        "tags": [["x"], []],
    }
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    paths = ("--shapes", tmp_path / "s.parquet", "--out", tmp_path / "o.parquet")
    assert cli("costs", "gemm", "--device", "a40", *paths).code == 0
    kept = pq.read_table(tmp_path / "o.parquet").drop_columns("predicted_ms")
    assert kept.to_pydict() == pa.table(columns).to_pydict()


def test_rows_keep_their_order_over_blocks_and_repetitions(cli, write, tmp_path):
    """As many rows as a sweep has: more than one block, most of them repeated."""
    drawn = np.random.default_rng(0).integers(1, 400, (100_000, 3)) * 8
    shapes = write("s.parquet", pd.DataFrame(drawn, columns=["m", "n", "k"]))
    out = tmp_path / "o.parquet"
    result = cli("costs", "gemm", "--device", "a100", "--shapes", shapes, "--out", out, "--json")
    assert result.json["rows"] == 100_000
    table = read(out)
    assert (table[["m", "n", "k"]].to_numpy() == drawn).all()
    some = table.iloc[::9973]
    expected_s = gemm_seconds(load_gemm("a100"), *(some[name].to_numpy() for name in "mnk"))
    np.testing.assert_allclose(some["predicted_ms"], expected_s * 1e3, rtol=1e-12)


BAD_SHAPES = {
    "missing column": ("s.csv", "m,n\n1,2\n", "s.csv: columns = ['m', 'n']: expected m, n, k; missing: k"),
    "fraction": (
        "s.csv",
        "m,n,k\n1,2,3\n1,2.5,3\n",
        "s.csv: n, row 2 (line 3) = 2.5: expected a whole number",
    ),
    "text": ("s.csv", "m,n,k\n1,2,3\n1,2,big\n", "s.csv: k, row 2 (line 3) = 'big': expected a whole number"),
    "zero": ("s.csv", "m,n,k\n0,2,3\n", "s.csv: m, row 1 (line 2) = 0: expected a whole number from 1"),
    "negative": ("s.csv", "m,n,k\n1,2,3\n1,2,-3\n", "s.csv: k, row 2 (line 3) = -3"),
    "blank": ("s.csv", "m,n,k\n1,2,3\n1,,3\n", "s.csv: n, row 2 (line 3) = None"),
    "NaN": ("s.parquet", SHAPES.assign(k=[1, 2, np.nan]), "s.parquet: k, row 3 = "),
    "truth": ("s.parquet", SHAPES.assign(k=True), "s.parquet: k, row 1 = True"),
    "empty file": ("s.csv", "", "s.csv is empty"),
    "no rows": ("s.parquet", SHAPES[:0], "s.parquet has no rows"),
    "not Parquet": ("s.parquet", b"nonsense", "s.parquet is not a whole Parquet file"),
    "not CSV": ("s.csv", "m,n,k\n1,2,3,4\n1,2,3,4\n", "s.csv is not a whole CSV file"),
    "suffix": ("s.xlsx", b"x", "= 's.xlsx': expected a name that ends with .parquet or .csv"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_bad_shapes_end_with_2_and_one_line(cli, write, tmp_path, case):
    name, content, message = BAD_SHAPES[case]
    path = tmp_path / name
    if isinstance(content, pd.DataFrame):
        content.to_parquet(path)
    else:
        write(name, content)
    result = cli("costs", "gemm", "--device", "a40", "--shapes", path, "--out", tmp_path / "o.csv", "--json")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "o.csv").exists()


BAD_OPTIONS = {
    "device": (["--device", "a4000"], "no device named 'a4000'; did you mean 'a40'?"),
    "no shapes": (["--shapes", "none.csv"], "cannot read none.csv: No such file or directory"),
    "suffix": (["--out", "o.json"], "--out = 'o.json': expected a name that ends with .parquet or .csv"),
    "missing folder": (["--out", "no/o.csv"], "--out = 'no/o.csv': expected a file in a folder that exists"),
    "folder": (["--out", "."], "--out = '.': expected a file, not a folder"),
    "file as folder": (["--out", "s.csv/o.csv"], "s.csv is a file"),
    "no table": (["--table", "none.csv"], "cannot read none.csv"),
    "table of others": (["--table", "t.csv"], "t.csv: device = ['h100']: expected rows of 'a40'"),
    "table of nothing": (["--table", "s.csv"], "missing: median_ms"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_end_with_2_and_one_line(cli, write, case):
    options, message = BAD_OPTIONS[case]
    write("s.csv", SHAPES)
    write("t.csv", SHAPES.assign(device="h100", median_ms=1.0))
    defaults = {"--device": "a40", "--shapes": "s.csv", "--out": "o.csv"} | dict([options])
    result = cli("costs", "gemm", *(word for pair in defaults.items() for word in pair))
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_unwritable_folder_is_refused_before_the_work(cli, write, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    result = cli(
        "costs", "gemm", "--device", "a40", "--shapes", tmp_path / "none.csv", "--out", tmp_path / "o.csv"
    )
    assert result.code == 2
    assert "--out" in result.err
    assert "a place that can be written" in result.err
