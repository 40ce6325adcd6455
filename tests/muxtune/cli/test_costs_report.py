from __future__ import annotations

import pytest

from experiments.costs.report import CostsReport
from tests.profiler.vidur_layout import write_layout


def test_report_without_tables_shows_what_ships(cli):
    result = cli("costs", "report")
    assert result.code == 0, result.err
    for text in (
        "Matrix products",
        "Element-wise operators",
        "Transfers and collectives",
        "held out",
        "h100",
    ):
        assert text in result.out
    assert "on the given tables" not in result.out


def test_report_compares_with_what_was_imported(cli, tmp_path):
    table = tmp_path / "m.parquet"
    cli("profile", "import", "vidur", write_layout(tmp_path / "data"), "--device", "a40", "--out", table)
    result = cli("costs", "report", "--table", table, "--out", tmp_path / "report", "--json")
    assert result.code == 0, result.err
    report = CostsReport.model_validate_json(result.out)
    assert {e.part for e in report.errors if e.device == "a40"} == {"gemm", "pointwise"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"fits.csv", "errors.csv", "errors.png"}
    people = cli("costs", "report", "--table", table)
    assert "Matrix products: mean error on the given tables" in people.out
    assert max(map(len, people.out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "none.parquet"], "cannot read none.parquet"),
        (["--table", "t.csv"], r"t.csv: columns = ['a']: expected median_ms and device"),
        (["--out", "t.csv"], "--out = 't.csv': expected a folder"),
    ],
)
def test_bad_options_end_with_2_and_one_line(cli, tmp_path, arguments, message):
    (tmp_path / "t.csv").write_text("a\n1\n")
    result = cli("costs", "report", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("command", ["gemm", "report"])
def test_commands_have_help_and_json(cli, command):
    assert "--json" in cli("costs", command, "--help").out
    assert f"\n  {command} " in cli("costs", "--help").out
