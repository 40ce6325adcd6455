from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from muxtune.costs.kept import kept_profile_path
from muxtune.costs.measurements import load_measurements
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import load_profile, save_profile
from muxtune.graph.attention_backends import AttentionContest, AttentionTime
from muxtune.model import PRESETS
from tests.kinds import MEASURED_KINDS
from tests.muxtune.cli.conftest import task
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators
from tests.profiler.vidur_layout import write_layout


@pytest.fixture
def measured(monkeypatch):
    """Calls of the profiler, which measures nothing."""
    calls = []

    def measure(model, *, out, **options):
        calls.append((model.name, model.dtype, options))
        profile = make_profile(analytic_law(), operators())
        save_profile(profile, out)
        return profile

    monkeypatch.setattr("profiler.profile_model", measure)
    return calls


def test_profile_is_a_command_of_its_own(cli, measured, tmp_path):
    out = tmp_path / "p.parquet"
    result = cli("profile", "--model", "llama-tiny", "--out", out, "--ranks", "1", "--quick", "--json")
    assert result.code == 0, result.err
    options = {"device": "cpu", "ranks": 1, "quick": True, "progress": True, "kinds": PLAIN_KINDS}
    options |= {"fresh": False}
    assert measured == [("llama-tiny", "float32", options)]
    assert result.json["profile_id"] == load_profile(out).profile_id


def test_methods_and_workloads_say_what_is_measured(cli, measured, write_workload, tmp_path):
    out = tmp_path / "p.parquet"

    def kinds(*arguments):
        result = cli("profile", "--out", tmp_path / "new.parquet", "--fresh", *arguments)
        assert result.code == 0, result.err
        return measured[-1][2]["kinds"] - PLAIN_KINDS

    model = ("--model", "llama-tiny")
    assert kinds(*model) == set()
    assert kinds(*model, "--methods", "ia3") == {"ia3"}
    lora = {"dropout", "lora_magnitude", "lora_dropped_dora", "lora_bias"}
    assert kinds(*model, "--methods", "lora, ia3") == lora | {"ia3"}
    assert kinds(*model, "--methods", "all") == set(MEASURED_KINDS) - PLAIN_KINDS
    dora = {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj"], "use_dora": True}
    workload = write_workload(task("a"), task("b", peft=dora), task("c", peft=dora | {"dropout": 0.1}))
    assert kinds("--workload", workload) == {"dropout", "lora_magnitude", "lora_dropped_dora"}
    assert kinds("--workload", workload, "--methods", "ia3") == {
        *("dropout", "lora_magnitude", "lora_dropped_dora", "ia3")
    }
    assert not out.exists()


def test_what_plan_looks_for_is_measured_by_default(cli, measured, write_workload, tmp_path):
    result = cli("profile", "--workload", write_workload(task("a")), "--json")
    assert result.code == 0, result.err
    kept = kept_profile_path(PRESETS["llama-tiny"], 2)
    assert result.json["out"] == str(kept)
    assert kept.exists()


def test_a_profile_that_is_there_says_what_it_is_of(cli, measured, tmp_path):
    out = tmp_path / "p.parquet"
    save_profile(make_profile(analytic_law(), operators()), out)
    result = cli("profile", "--out", out, "--methods", "ia3")
    assert result.code == 0, result.err
    model, dtype, options = measured[-1]
    assert (model, dtype) == ("llama-tiny", "float32")
    assert (options["ranks"], options["device"]) == (2, "cpu")
    assert cli("profile", "--out", out, "--fresh").code == 2  # nothing says what to measure


def test_profile_prints_a_table_for_people(cli, measured, tmp_path):
    result = cli("profile", "--out", tmp_path / "p.parquet", "--model", "llama-tiny")
    assert result.code == 0, result.err
    assert "| linear " in result.out


def test_profile_says_which_attention_has_won(cli, monkeypatch, tmp_path):
    contest = AttentionContest(
        streams=((8, 16),),
        times=(
            AttentionTime(backend="grouped", fwd_s=(0.2,), bwd_s=(0.4,)),
            AttentionTime(backend="loop", fwd_s=(0.1,), bwd_s=(0.2,)),
            AttentionTime(backend="varlen", missing="a CUDA device"),
        ),
        chosen="loop",
    )
    profile = make_profile(analytic_law(), operators())
    profile = replace(profile, provenance=profile.provenance.model_copy(update={"attention": contest}))
    monkeypatch.setattr("profiler.profile_model", lambda model, **options: profile)
    arguments = ("profile", "--out", tmp_path / "p.parquet", "--model", "llama-tiny")
    result = cli(*arguments)
    assert "attention by loop (times relative to grouped: grouped 1.00x, loop 0.50x)" in result.out
    told = cli(*arguments, "--json").json["provenance"]["attention"]
    assert [each["missing"] for each in told["times"]] == [None, None, "a CUDA device"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--model'"),
        (
            ["--model", "llama-tiny", "--quick"],
            "--out = None: expected a file: what --quick gives is not kept",
        ),
        (["--model", "llama-tiny", "--device", "cuda"], "--out = None: expected a file: what a GPU gives"),
        (["--model", "llama-tiny", "--methods", "lora,ia4"], "no PEFT method named 'ia4'"),
        (["--model", "llama-tiny", "--out", "p.parquet", "--device", "tpu"], "tpu"),
        (
            ["--quick", "import", "vidur", ".", "--device", "a40", "--out", "p.parquet"],
            "do not go with import",
        ),
        (["imports"], "No such command 'imports'"),
        (["import"], "vidur"),
        (["import", "vidur", ".", "--out", "p.parquet"], "Missing option '--device'"),
        (["import", "vidur", "--device", "a40", "--out", "p.parquet"], "Missing argument"),
    ],
)
def test_wrong_usage_ends_with_2(cli, measured, arguments, message):
    result = cli("profile", *arguments)
    assert result.code == 2
    assert message in result.out + result.err
    assert not measured


def test_help_shows_options_and_import(cli):
    text = cli("profile", "--help").out
    assert "--model" in text
    assert "\n  import " in text
    text = " ".join(cli("profile", "import", "vidur", "--help").out.split())
    assert "--json" in text
    assert "folder of a device, model or topology" in text


def test_import_writes_one_file_and_says_what_is_in_it(cli, tmp_path):
    out = tmp_path / "m.parquet"
    arguments = [
        "profile",
        "import",
        "vidur",
        write_layout(tmp_path / "data"),
        "--device",
        "a40",
        "--out",
        out,
    ]
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert result.out.splitlines() == [
        f"{out}: measurements of a40 from 5 files",
        "  gemm: 32 shapes",
        "  pointwise: 46 shapes",
        "  attention: 3 shapes",
        "  collectives: 3 shapes",
        "  1 measurements of 0 ms left out",
    ]
    assert set(load_measurements([out])) == {"gemm", "pointwise", "attention", "collectives"}
    result = cli(*arguments, "--json")
    assert result.json["out"] == str(out)
    assert result.json["provenance"]["rows"] == {
        "gemm": 32,
        "pointwise": 46,
        "attention": 3,
        "collectives": 3,
    }
    assert result.err == ""


def test_what_was_imported_refines_predictions(cli, tmp_path):
    out, shapes = tmp_path / "m.parquet", tmp_path / "s.csv"
    cli("profile", "import", "vidur", write_layout(tmp_path / "data"), "--device", "a40", "--out", out)
    shapes.write_text("m,n,k\n64,6144,4096\n")
    arguments = ["--device", "a40", "--shapes", shapes, "--out", tmp_path / "o.csv", "--table", out, "--json"]
    assert cli("costs", "gemm", *arguments).json["measurements"] == 32


@pytest.mark.parametrize(
    ("folder", "device", "message"),
    [
        ("nowhere", "a40", "DIR = 'nowhere': expected a folder of Vidur's measurements"),
        ("data", "a4", "no device in data named 'a4'; did you mean 'a40'?"),
        (
            "data/compute/a100",
            "a40",
            "--device = 'a40': expected a100, whose measurements data/compute/a100 has",
        ),
    ],
)
def test_a_wrong_import_ends_with_2_and_one_line(cli, tmp_path, folder, device, message):
    write_layout(tmp_path / "data")
    result = cli("profile", "import", "vidur", folder, "--device", device, "--out", "m.parquet")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not Path("m.parquet").exists()


def test_an_output_that_is_a_folder_is_refused_before_reading(cli, tmp_path):
    result = cli("profile", "import", "vidur", "nowhere", "--device", "a40", "--out", tmp_path)
    assert result.code == 2
    assert "expected a file, not a folder" in result.err
