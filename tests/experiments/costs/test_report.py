"""Errors are checked on measurements that are made up out of the shipped models, with a known deviation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.costs.errors import ANALYTIC, MEASURED, ROW_COLUMNS, row_errors
from experiments.costs.picture import draw_errors
from experiments.costs.report import BANDS, report_costs, shipped_fits
from experiments.costs.tables import render_report
from muxtune.costs.devices import device_names
from muxtune.costs.gemm import gemm_seconds, load_gemm
from muxtune.costs.links import link_names, load_link
from muxtune.costs.measurements import load_measurements
from muxtune.support.errors import UserError
from profiler.fitting.link_sources import SOURCES
from profiler.fitting.pointwise import load_rows

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "gpu_measurements"
TABLES = ("gemm", "pointwise", "collectives")
TOKENS = (64, 512, 4096)
WIDTHS = {"A-7b": 4096, "B-13b": 5120, "C-30b": 7168}


def gemm_table(device, deviation):
    """Products of three models, each ``deviation[model]`` slower than the device model says."""
    rows = [
        {"device": device, "model": model, "tp": 1, "op": op, "m": m, "n": n, "k": width}
        for model, width in WIDTHS.items()
        for op, n in (("attn_post_proj", width), ("mlp_up_proj", 4 * width))
        for m in TOKENS
    ]
    table = pd.DataFrame(rows)
    seconds = gemm_seconds(load_gemm(device), *(table[name].to_numpy() for name in "mnk"))
    return table.assign(median_ms=1e3 * seconds * (1 + table["model"].map(deviation)))


def write(path, table):
    table.to_parquet(path)
    return path


@pytest.fixture
def slow_gemm(tmp_path):
    """All 25 % slower: the device model is off by a fifth, and measurements of other models tell it."""
    return write(tmp_path / "gemm.parquet", gemm_table("a40", dict.fromkeys(WIDTHS, 0.25)))


def found(report, **wanted):
    wanted = dict.fromkeys(("operator", "group", "band")) | wanted
    return [e for e in report.errors if all(getattr(e, name) == value for name, value in wanted.items())]


def test_everything_that_ships_is_listed_with_its_origin():
    fits = list(shipped_fits())
    names = {part: [fit.name for fit in fits if fit.part == part] for part in TABLES}
    assert names == {"gemm": device_names(), "pointwise": device_names(), "collectives": link_names()}
    assert device_names() == ["a100", "a40", "h100"]
    for shipped in fits:
        assert shipped.fit is not None or shipped.basis
        if shipped.fit is not None:
            assert 0 < shipped.fit.error < 1
            assert shipped.fit.source
            assert shipped.fit.command


def test_the_error_of_the_device_model_is_that_which_was_put_in(slow_gemm):
    report = report_costs([slow_gemm])
    (whole,) = found(report, cost=ANALYTIC)
    assert (whole.part, whole.device, whole.rows) == ("gemm", "a40", 18)
    assert [whole.mean, whole.median, whole.p90] == pytest.approx([0.2, 0.2, 0.2])
    assert [e.mean for e in found(report, cost=ANALYTIC, group="A-7b")] == pytest.approx([0.2])
    by_size = [e for e in report.errors if e.operator == "mlp_up_proj" and e.band and e.cost == ANALYTIC]
    assert [(e.band, e.rows) for e in by_size] == [(band, 3) for band in BANDS]


def test_measurements_of_the_other_models_correct_what_all_have_in_common(slow_gemm):
    report = report_costs([slow_gemm])
    (whole,) = found(report, cost=MEASURED)
    assert whole.mean < 0.05
    assert {e.group for e in report.errors if e.group} == set(WIDTHS)


def test_the_own_measurements_of_a_model_are_left_out(tmp_path):
    """A model alone is twice as slow: none of the others can tell, so its error stays."""
    deviation = dict.fromkeys(WIDTHS, 0.0) | {"C-30b": 1.0}
    report = report_costs([write(tmp_path / "t.parquet", gemm_table("h100", deviation))])
    (odd,) = found(report, cost=MEASURED, group="C-30b")
    assert odd.mean == pytest.approx(0.5, abs=0.1)


def test_a_single_model_cannot_be_left_out(tmp_path):
    table = gemm_table("a40", dict.fromkeys(WIDTHS, 0.0))
    report = report_costs([write(tmp_path / "t.parquet", table[table["model"] == "A-7b"])])
    assert report.notes == ("gemm, a40: one model alone, so none can be left out",)
    assert {e.cost for e in report.errors} == {ANALYTIC}


def test_collectives_are_compared_with_their_link(tmp_path):
    source = SOURCES["nvlink-all-h100"]
    link = load_link("nvlink-all", "h100")
    sizes = 2.0 ** np.arange(11, 29)
    lines = link.all_reduce_lines(4)
    seconds = np.min([line.latency_s + line.s_per_byte * sizes for line in lines], axis=0)
    common = {
        "topology": source.topology,
        "collective": "all_reduce",
        "num_workers": 4,
        "devices_per_node": 4,
    }
    table = pd.DataFrame({"bytes": sizes.astype(int), "median_ms": 2e3 * seconds}).assign(**common)
    report = report_costs([write(tmp_path / "t.parquet", table)])
    (whole,) = found(report, part="collectives", device="nvlink-all-h100")
    assert whole.mean == pytest.approx(0.5, abs=0.02)  # measured twice as slow as predicted
    assert [e.group for e in report.errors if e.group] == ["all_reduce, 4 ranks, 4 per node"]
    assert whole.rows + sum(int(n) for note in report.notes for n in re.findall(r": (\d+)", note)) == len(
        sizes
    )


def test_what_no_model_covers_is_said(tmp_path):
    attention = {"device": "a40", "model": "M", "op": "attn_prefill", "tp": 1, "heads": 4, "kv_heads": 4}
    attention |= {"head_dim": 64, "sequences": 1, "query_tokens": 64, "cached_tokens": 0, "median_ms": 0.1}
    pointwise = {"device": "a40", "model": "Unheard-of", "op": "add", "tp": 1, "tokens": 4096, "hidden": 4096}
    pointwise |= {"ffn": 16384, "median_ms": 0.1}
    softcap = pointwise | {"model": "Llama-2-7b-hf", "op": "softcap"}
    link = {"topology": "v100_ring", "collective": "all_reduce", "num_workers": 2, "devices_per_node": 2}
    link |= {"bytes": 4096, "median_ms": 0.1}
    paths = [
        write(tmp_path / f"{i}.parquet", pd.DataFrame([row]))
        for i, row in enumerate((attention, pointwise, softcap, link))
    ]
    report = report_costs(paths)
    assert not report.errors
    assert report.notes == (
        "pointwise: 1 rows of Unheard-of, whose heads are not known",
        "pointwise: 1 rows of softcap, which no device model has",
        "attention: 1 rows, of paged kernels that training does not run",
        "collectives: no link is known for v100_ring",
    )


def test_an_unknown_device_is_refused(tmp_path):
    table = gemm_table("a40", dict.fromkeys(WIDTHS, 0.0)).assign(device="a400")
    with pytest.raises(UserError, match="no device with coefficients named 'a400'; did you mean 'a40'"):
        report_costs([write(tmp_path / "t.parquet", table)])


def test_files_hold_what_was_printed(slow_gemm, tmp_path):
    report = report_costs([slow_gemm], tmp_path / "out")
    assert [path.name for path in report.files] == ["fits.csv", "errors.csv", "errors.png"]
    assert all(path.stat().st_size for path in report.files)
    assert report.files[2].read_bytes().startswith(b"\x89PNG")
    errors = pd.read_csv(report.files[1])
    assert errors["mean"].tolist() == pytest.approx([e.mean for e in report.errors])
    fits = pd.read_csv(report.files[0])
    assert set(fits["name"]) == {fit.name for fit in report.fits}
    recorded = {(r.part, r.name): r.error for r in fits[fits["held_out"].isna()].itertuples()}
    assert recorded["gemm", "a40"] == load_gemm("a40").fit.error


def test_without_tables_only_the_fits_are_written(tmp_path):
    report = report_costs(out=tmp_path)
    assert [path.name for path in report.files] == ["fits.csv"]
    assert not report.errors


def test_tables_for_people_show_every_held_out_model_and_every_error(slow_gemm):
    report = report_costs([slow_gemm])
    text = render_report(report, width=160, colour=False)
    assert "\x1b" not in text
    for shipped in report.fits:
        assert f"\n  {shipped.name} " in text
        if shipped.part != "collectives" and shipped.fit:
            assert all(name in text for name in shipped.fit.held_out)
    line = next(line for line in text.splitlines() if line.startswith("  a40      mlp_up_proj"))
    assert line.count("20.0 % / ") == 4
    assert line.split()[-1] == "9"
    assert "\x1b[32m" in render_report(report, width=160, colour=True)


def test_an_empty_picture_is_refused(tmp_path):
    rows, _ = row_errors({})
    assert list(rows) == list(ROW_COLUMNS)
    with pytest.raises(UserError, match="there are no errors to draw"):
        draw_errors(rows, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def shared(tmp_path, every):
    """Every so-many-th row of the shared measurements, all collectives (their rows judge each other)."""
    paths = []
    for name in TABLES:
        source = SHARED / f"{name}.parquet"
        if not source.exists():
            pytest.skip(f"needs ../shared/data/gpu_measurements/{name}.parquet")
        table = pd.read_parquet(source)
        some = table if name == "collectives" else table.iloc[::every]
        paths.append(write(tmp_path / f"{name}.parquet", some))
    return paths


def test_the_shared_measurements_are_reported_whole(tmp_path):
    paths = shared(tmp_path, 97)
    report = report_costs(paths, tmp_path / "out")
    for part in ("gemm", "pointwise"):
        for device in device_names():
            (whole,) = found(report, part=part, device=device, cost=ANALYTIC)
            assert whole.mean < 0.15
            assert whole.rows > 100
    assert {e.group for e in report.errors if e.part == "gemm" and e.device == "a40" and e.group} == {
        "CodeLlama-34b-Instruct-hf",
        "Llama-2-70b-hf",
        "Llama-2-7b-hf",
        "phi-2",
    }
    (h100,) = found(report, part="collectives", device="nvlink-all-h100")
    assert h100.mean < 0.1
    assert any("a40" in note and "another path" in note for note in report.notes)
    assert (tmp_path / "out" / "errors.png").stat().st_size > 50_000


def test_rows_of_a_table_are_those_that_the_fit_reads(tmp_path):
    """The report prices element-wise rows as the fit does: same rows, same errors."""
    path = shared(tmp_path, 97)[1]
    rows, notes = row_errors({"pointwise": load_measurements([path])["pointwise"]})
    for device in device_names():
        assert (rows["device"] == device).sum() == len(load_rows(path, device))
    assert any("which are launches" in note for note in notes)
