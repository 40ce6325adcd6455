from __future__ import annotations

import pytest

from muxtune.policies import POLICIES
from tests.muxtune.cli.conftest import task

GPU = ("--model", "llama2-7b", "--cluster", "testbed-a")


def test_compare_plans_every_policy(cli, write_workload, profile_path):
    arguments = ["compare", "--workload", write_workload(), "--profile", profile_path]
    found = cli(*arguments, "--json").json
    names = {result["policy"] for result in found["policies"]}
    assert names == set(POLICIES.names()) - {"exhaustive"}
    assert found["predicted_speedup"]["nemo"] == 1
    # Others may make more, smaller micro-batches than a task declares, which is worth little.
    assert found["predicted_speedup"]["muxtune"] > 0.95 * max(found["predicted_speedup"].values())
    assert found["measured_speedup"] == {}
    table = cli(*arguments).out
    assert all(name in table for name in names)
    assert "vs nemo" in table


def test_policies_can_be_chosen(cli, write_workload, profile_path):
    arguments = ["compare", "--workload", write_workload(), "--profile", profile_path]
    found = cli(*arguments, "--policies", "muxtune, temporal-only", "--json").json
    assert [result["policy"] for result in found["policies"]] == ["muxtune", "temporal-only"]
    assert found["predicted_speedup"] == {}
    assert cli(*arguments, "--policies", "muxtuna").code == 2


def test_measuring_needs_a_folder(cli, write_workload, profile_path):
    result = cli("compare", "--workload", write_workload(), "--profile", profile_path, "--measure")
    assert (result.code, result.out) == (2, "")
    assert "--out = None: expected a folder" in result.err


def test_on_a_testbed_with_a_picture(cli, write_workload, tmp_path):
    picture = tmp_path / "policies.png"
    arguments = ["--workload", write_workload(dtype="bfloat16"), *GPU, "--picture", picture]
    result = cli("compare", *arguments)
    assert result.code == 0, result.err
    assert "testbed-a" not in result.out
    assert picture.stat().st_size > 10_000


def test_a_policy_that_does_not_fit_is_a_row_that_says_so(cli, write_workload, tmp_path):
    tasks = [task(f"t{i}") for i in range(20)]  # twenty backbones on four A40
    arguments = ["--workload", write_workload(*tasks, dtype="bfloat16"), *GPU]
    arguments += ["--policies", "nemo,sl-peft,temporal-only"]
    result = cli("compare", *arguments, "--picture", tmp_path / "policies.svg")
    assert result.code == 0, result.err
    (row,) = [line for line in result.out.splitlines() if line.startswith("| nemo")]
    assert "no plan" in row
    assert "nemo has no plan: cluster.device.memory_bytes of testbed-a" in result.out
    assert "vs sl-peft" in result.out  # the next of the paper's baselines
    assert "no plan" in (tmp_path / "policies.svg").read_text()
    found = cli("compare", *arguments, "--json").json
    assert found["baseline"] == "sl-peft"
    assert [bool(r["refused"]) for r in found["policies"]] == [True, False, False]


@pytest.mark.parametrize("name", ["policies.txt", "policies"])
def test_a_picture_needs_a_suffix_that_can_be_drawn(cli, write_workload, profile_path, name):
    arguments = ["--workload", write_workload(), "--profile", profile_path]
    result = cli("compare", *arguments, "--picture", name)
    assert (result.code, result.out) == (2, "")
    assert f"--picture = '{name}': expected a name that ends with .png, .svg or .pdf" in result.err
