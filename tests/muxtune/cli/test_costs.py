from __future__ import annotations

from muxtune.cli.costs import kept_profile_path
from muxtune.cluster import load_cluster
from muxtune.costs.profile import save_profile
from muxtune.model import PRESETS
from tests.muxtune.cli.conftest import task
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators


def test_the_machine_is_measured_once(cli, write_workload, monkeypatch, tmp_path):
    calls = []

    def measure(model, *, out, **options):
        calls.append((model.name, options["ranks"]))
        save_profile(make_profile(analytic_law(), operators()), out)

    monkeypatch.setattr("profiler.profile_model", measure)
    for _ in range(2):
        assert cli("plan", "--workload", write_workload()).code == 0
    assert calls == [("llama-tiny", 2)]
    assert len(list((tmp_path / "cache" / "profiles").iterdir())) == 1


def test_nothing_is_measured_for_a_workload_whose_data_is_missing(cli, write_workload, monkeypatch):
    def measure(*_, **__):
        raise AssertionError("measured in vain")

    monkeypatch.setattr("profiler.profile_model", measure)
    result = cli("plan", "--workload", write_workload(task("a", dataset={"path": "no.jsonl"})))
    assert result.code == 2
    assert "expected a readable JSONL file" in result.err


def test_what_changes_the_costs_changes_the_kept_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path))
    tiny = PRESETS["llama-tiny"]
    variants = [
        (tiny, "cpu-2"),
        (tiny, "cpu-1"),
        (tiny.model_copy(update={"dtype": "float64"}), "cpu-2"),
        (tiny.model_copy(update={"hidden": 128}), "cpu-2"),
        (PRESETS["gpt2-tiny"], "cpu-2"),
    ]
    paths = {kept_profile_path(model, load_cluster(cluster)) for model, cluster in variants}
    assert len(paths) == len(variants)
    other_weights = tiny.model_copy(update={"init_seed": 7})
    assert kept_profile_path(other_weights, load_cluster("cpu-2")) in paths
