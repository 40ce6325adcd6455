from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muxtune.support.errors import SpecError, UserError
from muxtune.support.user_tables import check_suffix, read_frame, write_frame


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


BROKEN = {
    "absent": ("absent.csv", None, "cannot read .*absent.csv: No such file"),
    "empty": ("t.csv", "", "is empty: expected a table"),
    "blank": ("t.csv", "\n\n", "is empty: expected a table"),
    "only a header": ("t.parquet", pd.DataFrame({"m": []}), "has no rows"),
    "long row": ("t.csv", "m,n\n1,2\n3,4,5\n", "is not a whole CSV file: Expected 2 fields in line 3, saw 3"),
    "long rows": ("t.csv", "m,n\n1,2,3\n3,4,5\n", "its rows are longer than its header"),
    "open quote": ("t.csv", 'm,n\n1,"2\n3,4\n', "is not a whole CSV file: EOF inside string"),
    "not a text": ("t.csv", b"m,n\n1,\xff\xfe\n", "is not a text in UTF-8"),
    "not Parquet": ("t.parquet", b"PAR1 and no more", "is not a whole Parquet file"),
    "Git LFS": ("t.csv", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "other suffix": ("t.txt", "m,n\n1,2\n", "expected a name that ends with .parquet or .csv"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_table_is_named_with_the_reason(tmp_path, case):
    name, content, message = BROKEN[case]
    path = tmp_path / name
    if isinstance(content, pd.DataFrame):
        content.to_parquet(path)
    elif content is not None:
        write(path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_frame(path)
    assert name in str(caught.value)


def test_a_folder_is_no_table(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*t.csv: Is a directory"):
        read_frame(tmp_path / "t.csv")


WRONG_CELLS = {
    "text": ("4\nx", r"m, row 2 \(line 3\) = 'x': expected a whole number from 1 to 2147483647"),
    "fraction": ("4\n2.5", r"row 2 \(line 3\) = 2.5"),
    "zero": ("0\n4", r"row 1 \(line 2\) = 0"),
    "negative": ("4\n4\n-3\n-1", r"row 3 \(line 4\) = -3: .* \(and 1 more rows\)"),
    "blank": ("4,\nNaN,", r"row 2 \(line 3\) = None"),
    "infinite": ("4\n1e999", r"row 2 \(line 3\) = inf"),
    "too large": ("4\n2147483648", r"row 2 \(line 3\) = 2147483648"),
    "beyond int64": ("4\n99999999999999999999999", r"row 2 \(line 3\) = '99999999999999999999999'"),
    "truth": ("True\nFalse", r"row 1 \(line 2\) = True"),
    "below a blank line": ("4\n\n\nx", r"row 2 \(line 5\) = 'x'"),
}


@pytest.mark.parametrize("case", WRONG_CELLS)
def test_a_cell_that_is_no_size_is_named_with_its_row_and_line(tmp_path, case):
    cells, message = WRONG_CELLS[case]
    header = "m,other" if "," in cells else "m"
    table = read_frame(write(tmp_path / "t.csv", f"{header}\n{cells}\n"))
    with pytest.raises(SpecError, match=message):
        table.whole("m")


def test_parquet_rows_count_from_1_and_nulls_are_found(tmp_path):
    pq.write_table(
        pa.table({"m": pa.array([1, None, 3]), "flag": [True, False, True]}), tmp_path / "t.parquet"
    )
    table = read_frame(tmp_path / "t.parquet")
    with pytest.raises(SpecError, match=r"t.parquet: m, row 2 = None: expected"):
        table.whole("m")
    with pytest.raises(SpecError, match="flag, row 1 = True"):
        table.positive("flag")


def test_rows_of_a_part_keep_their_place_in_the_file(tmp_path):
    table = read_frame(write(tmp_path / "t.csv", "kind,m\na,1\nb,2\nb,0\n"))
    part = table.where(table.names("kind") == "b").where(np.array([False, True]))
    with pytest.raises(SpecError, match=r"m, row 3 \(line 4\) = 0"):
        part.whole("m")


def test_whole_floats_are_whole_numbers(tmp_path):
    values = read_frame(write(tmp_path / "t.csv", "m\n4096.0\n1e3\n")).whole("m")
    assert values.dtype == np.int64
    assert values.tolist() == [4096, 1000]


def test_columns_of_times_names_and_choices(tmp_path):
    table = read_frame(write(tmp_path / "t.csv", "ms,op,blank\n0.5,a,1\n0,b,\n"))
    assert table.positive("ms", zero=True).tolist() == [0.5, 0]
    assert np.isnan(table.positive("blank", blank=True)[1])
    assert table.choice("op", ("a", "b")).tolist() == ["a", "b"]
    with pytest.raises(SpecError, match=r"ms, row 2 \(line 3\) = 0.0: expected a number above 0"):
        table.positive("ms")
    with pytest.raises(SpecError, match=r"op, row 2 \(line 3\) = 'b': expected one of a, c"):
        table.choice("op", ("a", "c"))
    with pytest.raises(SpecError, match=r"blank, row 2 \(line 3\) = None: expected a name"):
        table.names("blank")


def test_missing_and_repeated_columns_are_named(tmp_path):
    table = read_frame(write(tmp_path / "t.csv", "m,n\n1,2\n"))
    with pytest.raises(SpecError, match=r"t.csv: columns = \['m', 'n'\]: expected m, n, k; missing: k"):
        table.require(("m", "n", "k"))
    pq.write_table(pa.Table.from_arrays([[1], [2]], names=["m", "m"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="m"):
        read_frame(tmp_path / "t.parquet").require(("m",))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_what_is_written_reads_back(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_frame(pd.DataFrame({"m": [1, 2], "name": ["a", "b"], "x": [0.1, 2.5]}), path)
    frame = read_frame(path).frame
    assert frame.to_dict("list") == {"m": [1, 2], "name": ["a", "b"], "x": [0.1, 2.5]}


def test_types_that_nobody_asks_about_survive(tmp_path):
    columns = {"m": [1, 2], "rank": pa.array([None, 3], pa.int32()), "tags": [["a"], None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    write_frame(read_frame(tmp_path / "t.parquet").frame, tmp_path / "copy.parquet")
    assert pq.read_table(tmp_path / "copy.parquet").to_pydict() == pa.table(columns).to_pydict()
    assert pq.read_schema(tmp_path / "copy.parquet").field("rank").type == pa.int32()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*t.csv"):
        write_frame(pd.DataFrame({"m": [1]}), tmp_path / "file" / "t.csv")


def test_suffixes_are_checked_for_an_option():
    with pytest.raises(SpecError, match=r"--out = 'x.xlsx': expected a name that ends with"):
        check_suffix(Path("x.xlsx"), "--out")
