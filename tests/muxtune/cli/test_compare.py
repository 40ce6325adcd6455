from __future__ import annotations


def test_compare_plans_every_policy(cli, write_workload, profile_path):
    arguments = ["compare", "--workload", write_workload(), "--profile", profile_path]
    found = cli(*arguments, "--json").json
    names = {result["policy"] for result in found["policies"]}
    assert names >= {"muxtune", "nemo", "sl-peft", "spatial-only", "temporal-only"}
    assert found["predicted_speedup"]["nemo"] == 1
    assert found["predicted_speedup"]["muxtune"] == max(found["predicted_speedup"].values())
    assert found["measured_speedup"] == {}
    table = cli(*arguments).out
    assert all(name in table for name in names)
    assert "vs nemo" in table


def test_policies_can_be_chosen(cli, write_workload, profile_path):
    arguments = ["compare", "--workload", write_workload(), "--profile", profile_path]
    found = cli(*arguments, "--policies", "muxtune, sl-peft", "--json").json
    assert [result["policy"] for result in found["policies"]] == ["muxtune", "sl-peft"]
    assert found["predicted_speedup"] == {}
    assert cli(*arguments, "--policies", "muxtuna").code == 2


def test_measuring_needs_a_folder(cli, write_workload, profile_path):
    result = cli("compare", "--workload", write_workload(), "--profile", profile_path, "--measure")
    assert (result.code, result.out) == (2, "")
    assert "--out = None: expected a folder" in result.err
