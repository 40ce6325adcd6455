from __future__ import annotations


def test_models(cli):
    assert "llama-tiny" in cli("models").out
    assert {m["name"] for m in cli("models", "--json").json["models"]} >= {"llama-tiny", "gpt2-tiny"}


def test_clusters(cli):
    assert "cpu-1" in cli("clusters").out
    assert cli("clusters", "--json").json["clusters"][0]["ranks"] == 1


def test_policies(cli):
    names = {p["name"] for p in cli("policies", "--json").json["policies"]}
    assert names >= {"muxtune", "nemo", "sl-peft", "spatial-only", "temporal-only"}
    assert all(name in cli("policies").out for name in names)
