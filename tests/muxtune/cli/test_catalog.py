from __future__ import annotations

import pytest

from muxtune.cluster import load_cluster
from muxtune.model import PRESETS, ModelSpec


def test_models(cli):
    lines = [line.strip("| ").split("|") for line in cli("models").out.splitlines()]
    shown = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert shown["llama3-8b"] == "llama;32;4,096;32 / 8;14,336;128,256;8,192;8.03 B;bfloat16".split(";")
    assert shown["opt-tiny"] == "opt;6;256;8 / 8;1,024;264;1,024;5.07 M;float32".split(";")
    assert shown["opt-30b"][7] == "29.97 B"


def test_models_as_json(cli):
    models = {m["name"]: m for m in cli("models", "--json").json["models"]}
    assert models.keys() == PRESETS.keys()
    assert {name: m.pop("parameters") for name, m in models.items()} == {
        name: spec.parameters for name, spec in PRESETS.items()
    }
    assert {name: ModelSpec.model_validate(m) for name, m in models.items()} == PRESETS


def test_clusters(cli):
    text = cli("clusters").out
    assert all(name in text for name in ("testbed-b", "a100-8", "cpu-1", "nvlink-pair, infiniband"))
    listed = {cluster["name"]: cluster for cluster in cli("clusters", "--json").json["clusters"]}
    assert (listed["testbed-b"]["ranks"], listed["testbed-b"]["nodes"]) == (16, 8)
    assert listed["cpu-1"]["ranks"] == 1


def test_policies(cli):
    names = {p["name"] for p in cli("policies", "--json").json["policies"]}
    assert names >= {"muxtune", "nemo", "sl-peft", "spatial-only", "temporal-only"}
    assert all(name in cli("policies").out for name in names)


@pytest.mark.parametrize("name", ["testbed-a", "testbed-b", "testbed-c", "a100-16", "cpu-2"])
def test_a_shown_cluster_is_a_file_to_start_from(cli, tmp_path, name):
    result = cli("clusters", "show", name, "--yaml")
    assert result.code == 0, result.err
    path = tmp_path / "cluster.yaml"
    path.write_text(result.out)
    assert load_cluster(str(path)) == load_cluster(name)
    assert cli("clusters", "show", path, "--json").json == load_cluster(name).model_dump(mode="json")
    assert cli("clusters", "show", path).out == result.out


def test_a_cluster_that_is_not_there_is_refused(cli):
    result = cli("clusters", "show", "testbed-x")
    assert result.code == 2
    assert "no cluster named 'testbed-x'" in result.err
    assert cli("clusters", "--json", "show", "testbed-a").code == 2
    assert cli("clusters", "show", "testbed-a", "--json", "--yaml").code == 2
