"""The published layout of Vidur, written from known shapes, must give those shapes back."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from muxtune.costs.measurements import LAYOUTS, MeasurementsProvenance, load_measurements
from muxtune.support.errors import UserError
from profiler.vidur import import_vidur
from profiler.vidur_tables import merge, read_compute
from tests.profiler.vidur_layout import (
    CODELLAMA_34B,
    LLAMA2_7B,
    LLAMA3_8B,
    PHI_2,
    attention_rows,
    collective_rows,
    compute_rows,
    statistics,
    write_csv,
    write_layout,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "gpu_measurements"


@pytest.fixture
def root(tmp_path) -> Path:
    return write_layout(tmp_path / "profiling")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.parquet"


# Shapes by hand: (heads + 2 kv heads) * head width / tp; hidden; twice the MLP's width if it is gated.
NK = {
    (LLAMA2_7B, 1): [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    (LLAMA2_7B, 4): [(3072, 4096), (4096, 1024), (5504, 4096), (4096, 2752)],
    (CODELLAMA_34B, 8): [(1280, 8192), (8192, 1024), (5504, 8192), (8192, 2752)],
    (LLAMA3_8B, 8): [(768, 4096), (4096, 512), (3584, 4096), (4096, 1792)],
    (PHI_2, 1): [(7680, 2560), (2560, 2560), (10240, 2560), (2560, 10240)],
}


@pytest.mark.parametrize("case", NK, ids=lambda case: f"{case[0].folder.split('/')[1]}-tp{case[1]}")
def test_products_have_the_shapes_that_a_worker_runs(tmp_path, case):
    model, tp = case
    path = write_csv(tmp_path / "mlp.csv", compute_rows(model, (1, 4096), (tp,)))
    gemm = read_compute(path, "a40", "some")["gemm"]
    assert sorted(gemm["m"].unique()) == [1, 4096]
    ops = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    found = {row.op: (row.n, row.k) for row in gemm.itertuples()}
    assert found == dict(zip(ops, NK[case], strict=True))


def test_shapes_are_those_of_the_shared_measurements(tmp_path):
    if not (SHARED / "gemm.parquet").exists():
        pytest.skip("needs ../shared/data/gpu_measurements/gemm.parquet")
    shared = pd.read_parquet(SHARED / "gemm.parquet")
    shared = shared[(shared["device"] == "a100") & (shared["m"] == 512)]
    names = ["model", "op", "tp", "m", "n", "k"]
    for model in (LLAMA2_7B, LLAMA3_8B, CODELLAMA_34B, PHI_2):
        name = model.folder.split("/")[1]
        expected = shared[shared["model"] == name][names]
        tps = sorted(expected["tp"].unique())
        assert tps
        path = write_csv(tmp_path / name / "mlp.csv", compute_rows(model, (512,), tps))
        read = read_compute(path, "a100", name)["gemm"][names]
        keys = {tuple(row) for row in expected.itertuples(index=False)}
        assert {tuple(row) for row in read.itertuples(index=False)} == keys


def test_times_belong_to_their_operators(root, out):
    provenance = import_vidur(root, "a40", out)
    tables = load_measurements([out])
    rows = compute_rows(LLAMA3_8B, (64,), (8,))[0]
    mine = {"model": "Meta-Llama-3-8B", "tp": 8}
    for name, size in (("gemm", "m"), ("pointwise", "tokens")):
        table = tables[name]
        table = table[(table[list(mine)] == pd.Series(mine)).all(axis=1) & (table[size] == 64)]
        assert len(table) == (4 if name == "gemm" else 6)
        for row in table.itertuples():
            times = [rows[f"time_stats.{row.op}.{kind}"] for kind in ("median", "min", "std")]
            assert [row.median_ms, row.min_ms, row.std_ms] == pytest.approx(times)
    assert set(tables["pointwise"]["hidden"]) == {4096, 2560}
    heads = tables["pointwise"].query("model == 'Meta-Llama-3-8B' and tp == 8")[
        ["heads", "kv_heads", "head_dim"]
    ]
    assert heads.drop_duplicates().to_numpy().tolist() == [[4, 1, 128]]
    assert "post_attention_layernorm" not in set(tables["pointwise"].query("model == 'phi-2'")["op"])
    assert provenance.rows == {name: len(table) for name, table in tables.items()}


def test_attention_has_the_sizes_of_a_worker(root, out):
    provenance = import_vidur(root, "a40", out)
    attention = load_measurements([out])["attention"].set_index("op")
    assert provenance.below_resolution == 1  # the reshape of 0 ms
    sizes = ["heads", "kv_heads", "head_dim", "sequences", "query_tokens", "cached_tokens", "tp"]
    assert attention.loc["attn_prefill", sizes].tolist() == [16, 4, 128, 1, 512, 1024, 2]
    assert attention.loc["attn_decode", sizes].tolist() == [16, 4, 128, 16, 1, 32, 2]
    assert set(attention.index) == {"attn_prefill", "attn_decode", "attn_input_reshape"}


def test_collectives_are_those_of_the_devices_topologies(root, out):
    import_vidur(root, "a40", out)
    collectives = load_measurements([out])["collectives"]
    found = [tuple(row) for row in collectives[["topology", "collective", "bytes"]].itertuples(index=False)]
    assert found == [
        ("a40_dgx", "send_recv", 2048),
        ("a40_pairwise_nvlink", "all_reduce", 2048),
        ("a40_pairwise_nvlink", "all_reduce", 1 << 32),
    ]


# The first two rows of the published a40/meta-llama/Llama-2-7b-hf/mlp.csv: one shape, measured twice.
PUBLISHED_MS = {
    "attn_pre_proj": (3.755, 3.733),
    "attn_post_proj": (1.297, 1.2895),
    "attn_rope": (0.2495, 0.25),
}
MERGED_MS = {"attn_pre_proj": 3.744, "attn_post_proj": 1.29325, "attn_rope": 0.24975}


def test_a_shape_that_was_measured_twice_has_one_row(tmp_path, out):
    rows = compute_rows(LLAMA2_7B, (4096, 4096), (1,))
    for op, medians in PUBLISHED_MS.items():
        for row, median_ms in zip(rows, medians, strict=True):
            row.update(statistics(op, median_ms))
    write_csv(tmp_path / "Llama-2-7b-hf" / "mlp.csv", rows)
    provenance = import_vidur(tmp_path / "Llama-2-7b-hf", "a40", out)
    tables = load_measurements([out])
    merged = pd.concat([tables["gemm"], tables["pointwise"]]).set_index("op")["median_ms"]
    assert merged[list(MERGED_MS)].to_dict() == pytest.approx(MERGED_MS)
    assert len(merged) == provenance.merged == 10


def test_merging_takes_the_median_the_least_minimum_and_the_mean_deviation():
    key = {"topology": "t", "collective": "all_reduce", "num_workers": 2, "devices_per_node": 2, "bytes": 8}
    times = {
        "median_ms": [1.0, 2.0, 9.0, 0.0],
        "min_ms": [0.9, 0.5, 8.0, 0.0],
        "std_ms": [0.1, 0.2, 0.6, 0.0],
    }
    merged = merge("collectives", [pd.DataFrame([key] * 4).assign(**times)])
    assert merged.frame[list(times)].to_numpy().tolist() == [pytest.approx([2.0, 0.5, 0.3])]
    assert (merged.merged, merged.below_resolution) == (2, 1)


PLACES = {
    "root": ("", {"gemm", "pointwise", "attention", "collectives"}),
    "compute": ("compute", {"gemm", "pointwise", "attention"}),
    "device": ("compute/a40", {"gemm", "pointwise", "attention"}),
    "organization": ("compute/a40/microsoft", {"gemm", "pointwise"}),
    "model": ("compute/a40/microsoft/phi-2", {"gemm", "pointwise"}),
    "network": ("network", {"collectives"}),
    "topology": ("network/a40_dgx", {"collectives"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_level_of_the_layout_can_be_read(root, out, place):
    folder, tables = PLACES[place]
    provenance = import_vidur(root / folder, "A40", out)
    loaded = load_measurements([out])
    assert set(provenance.rows) == set(loaded) == tables
    assert provenance.device == "a40"
    assert all(set(t["device"]) == {"a40"} for name, t in loaded.items() if name != "collectives")


def test_folders_outside_of_the_layout_are_taken_at_their_word(root, out, tmp_path):
    (root / "compute" / "a40").rename(tmp_path / "mine")
    assert import_vidur(tmp_path / "mine", "l40", out).device == "l40"
    (tmp_path / "mine" / "microsoft" / "phi-2").rename(tmp_path / "phi-2")
    assert import_vidur(tmp_path / "phi-2", "l40", out).rows == {"gemm": 8, "pointwise": 10}


def test_the_file_is_one_table_with_its_provenance(root, out):
    provenance = import_vidur(root, "a40", out)
    file = pq.read_table(out)
    keys = {key for layout in LAYOUTS.values() for key in (*layout.keys, *layout.optional)}
    assert set(file.column_names) == {"table", "median_ms", "min_ms", "std_ms"} | keys
    recorded = json.loads(file.schema.metadata[b"muxtune.measurements"])
    assert MeasurementsProvenance.model_validate(recorded) == provenance
    assert recorded["folder"] == str(root)
    assert recorded["files"] == 5
    assert set(recorded["versions"]) == {"muxtune"}
    gemm = file.to_pandas().query("table == 'gemm'")
    assert gemm["bytes"].isna().all()
    assert gemm[["m", "n", "k"]].notna().to_numpy().all()


WRONG_PLACES = {
    "absent": ("nowhere", "a40", "DIR = .*nowhere.*: expected a folder of Vidur's measurements"),
    "unknown device": ("", "a400", "no device in .* named 'a400'; did you mean 'a40'"),
    "other device's folder": ("compute/a100", "a40", "--device = 'a40': expected a100, whose measurements"),
    "other device's model": ("compute/a100/microsoft/phi-2", "a40", "expected a100"),
    "other device's topology": ("network/a100_dgx", "a40", "expected a100"),
    "empty": (
        "void",
        "a40",
        "has no measurements of Vidur: expected mlp.csv or attention.csv below compute/a40",
    ),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_a_wrong_folder_is_refused(root, out, case):
    folder, device, message = WRONG_PLACES[case]
    (root / "void").mkdir()
    with pytest.raises(UserError, match=message):
        import_vidur(root / folder, device, out)
    assert not out.exists()


def test_models_of_one_name_are_not_mixed(root, out):
    write_csv(root / "compute/a40/other/phi-2/mlp.csv", compute_rows(PHI_2, (8,), (1,)))
    with pytest.raises(UserError, match="would both be 'phi-2': import one at a time"):
        import_vidur(root, "a40", out)


def _changed(column: str, value: object, row: int = 1):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


def _without(column: str):
    return lambda rows: [{name: cell for name, cell in row.items() if name != column} for row in rows]


MALFORMED_COMPUTE = {
    "text for a size": (
        _changed("n_embd", "wide"),
        r"n_embd, row 2 \(line 3\) = 'wide': expected a whole number",
    ),
    "no tokens": (
        _changed("num_tokens", 0),
        r"num_tokens, row 2 \(line 3\) = 0: expected a whole number from 1",
    ),
    "blank size": (_changed("n_head", None), r"n_head, row 2 \(line 3\) = None"),
    "blank time of a product": (
        _changed("time_stats.mlp_up_proj.median", None),
        r"time_stats.mlp_up_proj.median, row 2 \(line 3\) = None: expected a number",
    ),
    "negative time": (
        _changed("time_stats.add.median", -0.5, 0),
        r"time_stats.add.median, row 1 \(line 2\) = -0.5",
    ),
    "text for a minor time": (
        _changed("time_stats.emb.std", "n/k"),
        r"time_stats.emb.std, row 2 \(line 3\) = 'n/k'",
    ),
    "gate": (
        _changed("use_gated_mlp", "maybe"),
        r"use_gated_mlp, row 2 \(line 3\) = 'maybe': expected True or False",
    ),
    "heads": (_changed("n_head", 30), r"n_embd, row 2 \(line 3\) = 4096: expected a multiple of the heads"),
    "workers": (
        _changed("num_tensor_parallel_workers", 16),
        r"n_kv_head, row 2 \(line 3\) = 8: expected a multiple of the workers",
    ),
    "no product": (_without("time_stats.mlp_down_proj.median"), "missing: time_stats.mlp_down_proj.median"),
    "no shape": (_without("n_kv_head"), "mlp.csv: columns = .*missing: n_kv_head"),
}


@pytest.mark.parametrize("case", MALFORMED_COMPUTE)
def test_a_malformed_compute_file_is_named_with_column_and_row(tmp_path, out, case):
    change, message = MALFORMED_COMPUTE[case]
    write_csv(tmp_path / "m" / "mlp.csv", change(compute_rows(LLAMA3_8B, (8, 16, 32), (1,))))
    with pytest.raises(UserError, match=message) as caught:
        import_vidur(tmp_path / "m", "a40", out)
    assert str(tmp_path / "m" / "mlp.csv") in str(caught.value)
    assert not out.exists()


MALFORMED_OTHERS = {
    "attention without sizes": (
        "attention.csv",
        _without("kv_cache_size")(attention_rows(LLAMA3_8B, 1)),
        "missing: kv_cache_size",
    ),
    "attention without times": (
        "attention.csv",
        [{k: v for k, v in row.items() if not k.startswith("time")} for row in attention_rows(LLAMA3_8B, 1)],
        "expected a median of attn_prefill, .* as time_stats.attn_prefill.median",
    ),
    "attention with a negative cache": (
        "attention.csv",
        _changed("kv_cache_size", -1)(attention_rows(LLAMA3_8B, 1)),
        r"kv_cache_size, row 2 \(line 3\) = -1: expected a whole number from 0",
    ),
    "unknown collective": (
        "all_reduce.csv",
        _changed("collective", "gossip")(collective_rows("all_reduce", 2, {8: 0.1, 16: 0.1})),
        r"collective, row 2 \(line 3\) = 'gossip': expected one of all_reduce",
    ),
    "two collectives": (
        "all_reduce.csv",
        _changed("collective", "send_recv")(collective_rows("all_reduce", 2, {8: 0.1, 16: 0.1})),
        r"collective, row 2 \(line 3\) = 'send_recv': expected all_reduce, as in the first row",
    ),
    "times of another collective": (
        "send_recv.csv",
        _changed("collective", "send_recv", 0)(collective_rows("all_reduce", 2, {8: 0.1})),
        "missing: time_stats.send_recv.median",
    ),
    "pointer": ("mlp.csv", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "cut off": ("mlp.csv", 'a,b\n1,"2', "is not a whole CSV file"),
}


@pytest.mark.parametrize("case", MALFORMED_OTHERS)
def test_other_malformed_files_are_named_too(tmp_path, out, case):
    name, content, message = MALFORMED_OTHERS[case]
    path = tmp_path / "a40_dgx" / name
    if isinstance(content, str):
        path.parent.mkdir()
        path.write_text(content)
    else:
        write_csv(path, content)
    with pytest.raises(UserError, match=message) as caught:
        import_vidur(path.parent, "a40", out)
    assert str(path) in str(caught.value)
