"""The example of a policy of one's own: installed as a package, found through its entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.installed import install, run_muxtune

PACKAGE = ROOT / "examples" / "policy-package"
WORKLOAD = ROOT / "examples" / "eight-tenants.yaml"

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(PACKAGE, tmp_path_factory.mktemp("policy"))


def test_its_policy_is_listed_with_its_summary(installed, tmp_path):
    listed = run_muxtune(installed, "policies", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "by-length" in listed.stdout
    assert "an hTask per declared length" in listed.stdout


def test_it_makes_plans(installed, tmp_path):
    arguments = ["--workload", WORKLOAD, "--cluster", "testbed-a", "--policy", "by-length"]
    planned = run_muxtune(installed, "plan", *arguments, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["decisions"]["policy"] == "by-length"
    lengths = {task["id"]: task["max_length"] for task in plan["decisions"]["tasks"]}
    groups = [{lengths[task_id] for task_id in htask["task_ids"]} for htask in plan["decisions"]["htasks"]]
    assert groups == [{64}, {128}, {256}]
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_it_may_be_asked_for_an_orchestration_and_an_objective(installed, tmp_path):
    arguments = ["--workload", WORKLOAD, "--cluster", "testbed-a", "--policy", "by-length"]
    asked = ["--tp", "2", "--orchestration", "interleaved", "--objective", "memory"]
    planned = run_muxtune(installed, "plan", *arguments, *asked, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    decisions = json.loads(planned.stdout)["decisions"]
    assert decisions["orchestration"]["mode"] == "interleaved"
    assert decisions["objective"] == "memory"
    refused = run_muxtune(installed, "plan", *arguments, "--policy-option", "width=2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--policy-option = 'width': expected nothing: by-length has no options" in refused.stderr


def test_it_is_compared_with_the_others(installed, tmp_path):
    arguments = ["--workload", WORKLOAD, "--cluster", "testbed-a", "--policies", "by-length,nemo"]
    compared = run_muxtune(installed, "compare", *arguments, "--json", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert set(json.loads(compared.stdout)["predicted_speedup"]) == {"by-length", "nemo"}


def test_a_fusion_by_hand_is_refused_as_by_our_own_policies(installed, tmp_path):
    arguments = ["--workload", WORKLOAD, "--cluster", "testbed-a", "--policy", "by-length"]
    refused = run_muxtune(installed, "plan", *arguments, "--partition", "sst2-a,sst2-b", cwd=tmp_path)
    assert refused.returncode == 2
    assert "by-length decides the fusion by itself" in refused.stderr


def test_without_the_package_the_name_is_unknown(tmp_path):
    arguments = ["--workload", WORKLOAD, "--cluster", "testbed-a", "--policy", "by-length"]
    refused = run_muxtune(tmp_path, "plan", *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert "no policy named 'by-length'" in refused.stderr
