"""The fit of element-wise kernels recovers the device behind a table, and refuses what it cannot read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from muxtune.costs.pointwise import PointwiseCoefficients, load_pointwise
from muxtune.support.errors import UserError
from profiler.fitting.pointwise import (
    HEADS,
    errors,
    fit_pointwise,
    held_out_errors,
    load_rows,
    main,
    predict,
)

REAL = Path(__file__).parents[4] / "shared/data/gpu_measurements/pointwise.parquet"
SHAPES = {"Llama-2-7b-hf": (4096, 11008), "Llama-2-70b-hf": (8192, 28672), "phi-2": (2560, 10240)}
OPERATORS = ("add", "emb", "attn_rope", "input_layernorm", "post_attention_layernorm", "mlp_act")


def table_of(device="a100", noise=0.0):
    """A table as of a device with the shipped coefficients, in milliseconds."""
    generator = np.random.default_rng(0)
    rows = [
        (device, model, tp, op, tokens, hidden, ffn)
        for model, (hidden, ffn) in SHAPES.items()
        for tp in ((1,) if model == "phi-2" else (1, 4))
        for op in OPERATORS
        if (model, op) != ("phi-2", "post_attention_layernorm")
        for tokens in (1, 8, 40, 96, 136, 256, 384, 512, 768, 1024, 2048, 3072, 4096)
    ]
    table = pd.DataFrame(rows, columns=["device", "model", "tp", "op", "tokens", "hidden", "ffn"])
    return table.assign(median_ms=1.0), np.exp(generator.normal(0.0, noise, len(table)))


@pytest.fixture
def table_path(tmp_path):
    def write(device="a100", noise=0.0):
        table, factor = table_of(device, noise)
        path = tmp_path / "table.parquet"
        table.to_parquet(path)
        rows = load_rows(path, device)
        kept = table["tokens"] >= rows["tokens"].min()
        table.loc[kept, "median_ms"] = predict(load_pointwise(device), rows) * 1e3 * factor[kept]
        table.to_parquet(path)
        return path

    return write


def test_a_fit_recovers_the_device_that_made_the_table(table_path):
    rows = load_rows(table_path(), "a100")
    fitted, truth = fit_pointwise(rows, "a100"), load_pointwise("a100")
    assert errors(fitted, rows)["error"].mean() < 0.01
    for name in ("launch_s", "dram_bytes_per_s", "gather_s", "block_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.1), name
    for kind, pass_s in truth.pass_s.items():
        assert fitted.pass_s[kind] == pytest.approx(pass_s, rel=0.2), kind


def test_a_fit_withstands_noise(table_path):
    rows = load_rows(table_path(noise=0.05), "a100")
    clean = rows.assign(measured_s=predict(load_pointwise("a100"), rows))
    assert errors(fit_pointwise(rows, "a100"), clean)["error"].mean() < 0.02


def test_operators_become_kernels_with_widths_of_one_shard(table_path):
    rows = load_rows(table_path(), "a100").set_index(["model", "tp", "op"])
    assert set(rows["tokens"]) == {40, 96, 136, 256, 384, 512, 768, 1024, 2048, 3072, 4096}

    def first(*key):
        row = rows.loc[key].iloc[0]
        return row["kind"], row["width"], row["kernels"]

    assert first("Llama-2-7b-hf", 4, "mlp_act") == ("silu_gate", 2752.0, 1)
    assert first("Llama-2-70b-hf", 4, "attn_rope") == ("rope", (16 + 2) * 128, 1)
    assert first("Llama-2-70b-hf", 4, "add") == ("add", 8192.0, 1)
    assert first("phi-2", 1, "add") == ("add", 2560.0, 2)
    assert first("phi-2", 1, "input_layernorm") == ("layer_norm", 2560.0, 1)
    assert first("phi-2", 1, "mlp_act") == ("gelu", 10240.0, 1)
    # Half a head of 80 is 80 bytes, which touch three sectors of 32 bytes.
    assert first("phi-2", 1, "attn_rope") == ("rope", 64 * 96, 1)


def test_a_held_out_model_leaves_out_what_only_it_has(table_path):
    found = held_out_errors(load_rows(table_path(), "a100"), "a100")
    assert set(found) == {"Llama-2-7b-hf", "Llama-2-70b-hf", "phi-2 without gelu, layer_norm"}
    assert max(found.values()) < 0.05


def test_the_command_writes_coefficients_with_their_origin(table_path, tmp_path, capsys):
    out = tmp_path / "deep" / "pointwise.json"
    main(["--table", str(table_path()), "--device", "a100", "--out", str(out)])
    fitted = PointwiseCoefficients.model_validate(json.loads(out.read_text()))
    assert fitted.fit.command == (
        "python -m profiler.fitting pointwise --table table.parquet --device a100 --out pointwise.json"
    )
    assert fitted.fit.error < 0.01
    assert fitted.sm_count == 108
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="ffn"), "expected ffn among them"),
        (lambda t: t.assign(device="b200"), "expected rows of a100"),
        (lambda t: t.assign(model="gpt-5"), "no model with known heads named 'gpt-5'"),
        (lambda t: t.assign(op="conv"), "op = 'conv': expected one of add, emb"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(change, message, tmp_path):
    path = tmp_path / "bad.parquet"
    change(table_of()[0]).to_parquet(path)
    with pytest.raises(UserError, match=message):
        load_rows(path, "a100")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "no.parquet"
    path.write_text("nothing")
    with pytest.raises(UserError, match="cannot read the table"):
        load_rows(path, "a100")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["a40", "a100", "h100"])
def test_models_that_were_left_out_are_within_12_percent_per_operator(device):
    if not REAL.exists():
        pytest.skip(f"the measurements {REAL} are not there")
    rows = load_rows(REAL, device)
    left_out = []
    for model in sorted(set(rows["model"])):
        others = rows[rows["model"] != model].reset_index(drop=True)
        own = rows[(rows["model"] == model) & rows["kind"].isin(others["kind"])].reset_index(drop=True)
        reported = errors(fit_pointwise(others, device), own)
        assert reported["error"].mean() <= 0.125, model
        left_out.append(reported)
    by_operator = pd.concat(left_out).groupby("op")["error"].mean()
    assert by_operator.max() <= 0.12, by_operator
    assert set(HEADS) >= set(rows["model"])
