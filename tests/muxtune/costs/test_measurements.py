from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from muxtune.costs.measurements import (
    LAYOUTS,
    MeasurementsProvenance,
    load_gemm_measurements,
    load_measurements,
    save_measurements,
)
from muxtune.support.errors import UserError

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "gpu_measurements"

ONE = {"device": "a40", "model": "M", "tp": 2}
GEMM = ONE | {
    "op": "mlp_up_proj",
    "m": 64,
    "n": 512,
    "k": 256,
    "median_ms": 0.2,
    "min_ms": 0.1,
    "std_ms": 0.01,
}
POINTWISE = ONE | {"op": "add", "tokens": 64, "hidden": 256, "ffn": 1024, "median_ms": 0.02}
ATTENTION = ONE | {"op": "attn_prefill", "heads": 4, "kv_heads": 2, "head_dim": 64, "sequences": 1}
ATTENTION |= {"query_tokens": 64, "cached_tokens": 0, "median_ms": 0.3}
COLLECTIVES = {"topology": "a40_x", "collective": "all_reduce", "num_workers": 2, "devices_per_node": 2}
COLLECTIVES |= {"bytes": 1 << 33, "median_ms": 9.0, "min_ms": 8.5}
ROWS = {"gemm": GEMM, "pointwise": POINTWISE, "attention": ATTENTION, "collectives": COLLECTIVES}

PROVENANCE = MeasurementsProvenance(
    source="a test",
    folder="somewhere",
    created_utc="2026-01-01T00:00:00+00:00",
    device="a40",
    files=1,
    rows={"gemm": 1},
    merged=0,
    below_resolution=0,
    versions={},
)


def write(path, *rows):
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def only(frame):
    assert len(frame) == 1
    return {name: value for name, value in frame.iloc[0].to_dict().items() if pd.notna(value)}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_plain_table_is_recognized_by_its_columns(tmp_path, kind, suffix):
    loaded = load_measurements([write(tmp_path / f"t{suffix}", ROWS[kind] | {"note": "is dropped"})])
    assert list(loaded) == [kind]
    assert only(loaded[kind]) == ROWS[kind]


def test_tables_in_one_file_come_back_as_they_went_in(tmp_path):
    path = tmp_path / "t.parquet"
    save_measurements({name: pd.DataFrame([row]) for name, row in ROWS.items()}, PROVENANCE, path)
    loaded = load_measurements([path])
    assert list(loaded) == list(LAYOUTS)
    for name, row in ROWS.items():
        assert only(loaded[name]) == row
    metadata = pq.read_schema(path).metadata[b"muxtune.measurements"]
    assert MeasurementsProvenance.model_validate_json(metadata) == PROVENANCE


def test_tables_in_several_files_become_one(tmp_path):
    first = write(tmp_path / "a.csv", GEMM)
    second = write(tmp_path / "b.parquet", {name: cell for name, cell in GEMM.items() if name != "std_ms"})
    loaded = load_measurements([first, second, write(tmp_path / "c.csv", COLLECTIVES)])
    assert list(loaded) == ["gemm", "collectives"]
    assert loaded["gemm"]["std_ms"].isna().tolist() == [False, True]


def test_a_size_that_is_known_for_some_rows_only_is_kept(tmp_path):
    path = write(tmp_path / "t.csv", POINTWISE | {"heads": 8}, POINTWISE | {"tokens": 8})
    heads = load_measurements([path])["pointwise"]["heads"]
    assert heads.iloc[0] == 8
    assert pd.isna(heads.iloc[1])


WRONG = {
    "no kind": (
        {"a": 1, "median_ms": 0.1},
        r"t.csv: columns = \['a', 'median_ms'\]: expected median_ms and device",
    ),
    "kind": (GEMM | {"table": "gem"}, r"table, row 1 \(line 2\) = 'gem': expected one of gemm, pointwise"),
    "column": ({k: v for k, v in GEMM.items() if k != "op"}, "missing: op"),
    "tp": ({k: v for k, v in POINTWISE.items() if k != "tp"}, "missing: tp"),
    "time": (GEMM | {"median_ms": 0.0}, r"median_ms, row 1 \(line 2\) = 0.0: expected a number above 0"),
    "minor time": (
        GEMM | {"std_ms": -1.0},
        r"std_ms, row 1 \(line 2\) = -1.0: expected a number, 0 or above",
    ),
    "size": (COLLECTIVES | {"bytes": 0.5}, r"bytes, row 1 \(line 2\) = 0.5: expected a whole number"),
    "count": (ATTENTION | {"cached_tokens": -4}, r"cached_tokens, row 1 \(line 2\) = -4"),
    "name": (GEMM | {"model": None}, r"model, row 1 \(line 2\) = None: expected a name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_named_with_column_and_row(tmp_path, case):
    row, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        load_measurements([write(tmp_path / "t.csv", row)])
    assert "t.csv" in str(caught.value)


def test_a_wrong_row_of_one_table_among_others_keeps_its_number(tmp_path):
    path = write(
        tmp_path / "t.csv", GEMM | {"table": "gemm"}, COLLECTIVES | {"table": "collectives", "bytes": 0}
    )
    with pytest.raises(UserError, match=r"bytes, row 2 \(line 3\) = 0"):
        load_measurements([path])


def test_products_of_one_device_are_picked(tmp_path):
    other = GEMM | {"device": "h100", "m": 128}
    path = write(
        tmp_path / "t.parquet", GEMM | {"table": "gemm"}, other | {"table": "gemm"}, {"table": "collectives"}
    )
    assert load_gemm_measurements(path, "h100").to_dict("records") == [
        {"m": 128, "n": 512, "k": 256, "median_ms": 0.2}
    ]
    with pytest.raises(UserError, match=r"t.parquet: device = \['a40', 'h100'\]: expected rows of 'a100'"):
        load_gemm_measurements(path, "a100")


def test_products_without_a_device_are_taken_at_their_word(tmp_path):
    path = write(tmp_path / "t.csv", {"m": 1, "n": 2, "k": 3, "median_ms": 0.4})
    assert len(load_gemm_measurements(path, "a40")) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (COLLECTIVES, "columns = .*missing: m, n, k"),
        (COLLECTIVES | {"table": "collectives"}, r"table = \['collectives'\]: expected rows of 'gemm'"),
        ({"m": 1, "n": 2, "k": 3, "median_ms": -1}, r"median_ms, row 1 \(line 2\) = -1"),
    ],
)
def test_a_table_without_products_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_gemm_measurements(write(tmp_path / "t.csv", row), "a40")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the measurements .*file/t.parquet"):
        save_measurements({}, PROVENANCE, tmp_path / "file" / "t.parquet")


def test_the_shared_measurements_are_read_whole():
    paths = [SHARED / f"{name}.parquet" for name in ("gemm", "pointwise", "collectives")]
    if not all(path.exists() for path in paths):
        pytest.skip("needs ../shared/data/gpu_measurements/{gemm,pointwise,collectives}.parquet")
    loaded = load_measurements(paths)
    assert {name: len(table) for name, table in loaded.items()} == {
        "gemm": 50740,
        "pointwise": 75333,
        "collectives": 26340,
    }
