"""plan, run, validate and compare as a user's shell sees them: exit codes and streams.

Of real processes where a plan is made and where it is run; what follows is called in this process, which has
imported everything.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from muxtune.costs import save_profile
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

pytestmark = pytest.mark.integration


def muxtune(folder, *arguments):
    command = [sys.executable, "-c", "from muxtune.cli.app import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A folder with profile, workload and plan."""
    folder = tmp_path_factory.mktemp("loop")
    save_profile(make_profile(analytic_law(), operators()), folder / "profile.parquet")
    task = {
        "peft": {"method": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 64,
        "learning_rate": 1e-3,
        "steps": 3,
    }
    tasks = [{"id": id_, **task} for id_ in ("a", "b")]
    (folder / "workload.yaml").write_text(yaml.safe_dump({"backbone": "llama-tiny", "tasks": tasks}))
    done = muxtune(folder, "plan", "--workload", "workload.yaml", "--profile", "profile.parquet")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_plan_is_run_and_validated(planned, command, monkeypatch):
    monkeypatch.chdir(planned)
    ran = muxtune(planned, "run", "plan.json", "--out", "run", "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)  # one object and nothing else, whatever gloo and the ranks print
    assert report == json.loads((planned / "run" / "run.json").read_text())
    assert report["effective_tokens_per_s"] > 0

    arguments = ("validate", "plan.json", "run", "--solo-steps", "2", "--gantt", "gantt.png")
    validated = command(*arguments, "--json")
    assert validated.code == 0, validated.err
    report = validated.json
    assert report["measured_iteration_s"] > 0
    assert report["predicted_iteration_s"] > 0
    assert report["max_loss_difference"] < 1e-5
    assert (planned / "gantt.png").stat().st_size > 5_000

    again = command("run", "plan.json", "--out", "run")
    assert (again.code, again.out) == (2, "")
    assert "run is not empty" in again.err
    resumed = command("run", "plan.json", "--out", "run", "--resume")
    assert resumed.code == 0, resumed.err
    assert "effective tokens/s" in resumed.out


@pytest.mark.slow
def test_policies_are_compared_by_real_runs(planned, command, monkeypatch):
    monkeypatch.chdir(planned)
    done = command(
        *("compare", "--workload", "workload.yaml", "--profile", "profile.parquet"),
        *("--policies", "muxtune,nemo", "--measure", "--out", "runs", "--steps", "2", "--json"),
    )
    assert done.code == 0, done.err
    found = done.json
    assert found["measured_speedup"].keys() == {"muxtune", "nemo"}
    assert [result["measured"]["steps"] for result in found["policies"]] == [2, 2]
    ours, theirs = (sum(result["measured"]["backbone_bytes"]) for result in found["policies"])
    assert theirs == 2 * ours
    assert (planned / "runs" / "nemo" / "run.json").exists()
