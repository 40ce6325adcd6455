from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.integration.processes import wait_until
from tests.muxtune.cli.conftest import task

EXAMPLE = Path(__file__).parents[3] / "examples" / "sweep.yaml"
SWEEP = {
    "model": "llama2-7b",
    "cluster": "testbed-a",
    "workload": {"count": 3},
    "grid": {"workload.random": list(range(12)), "policy": ["nemo", "muxtune"]},
}


@pytest.fixture
def write_sweep(tmp_path):
    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
        return path

    return write


def test_a_sweep_over_a_workload_file_with_a_profile(
    cli, write_workload, write_sweep, profile_path, tmp_path
):
    workload = write_workload(task("a"), task("b", micro_batch_size=2))
    sweep = write_sweep(
        model=None, cluster="cpu-2", workload=workload.name, grid={"policy": ["nemo", "muxtune"]}
    )
    result = cli("sweep", sweep, "--out", "r.parquet", "--profile", profile_path, "--jobs", 1, "--json")
    assert result.code == 0, result.err
    assert {k: result.json[k] for k in ("points", "planned", "refused", "failed", "reused")} == {
        "points": 2,
        "planned": 2,
        "refused": 0,
        "failed": 0,
        "reused": 0,
    }
    planned = cli("plan", "--workload", workload, "--profile", profile_path, "--json").json
    row = pd.read_parquet(tmp_path / "r.parquet").iloc[1]
    assert row.iteration_s == planned["predicted"]["iteration_s"]
    assert row.costs == planned["decisions"]["costs"]["profile_id"]
    text = cli("sweep", sweep, "--out", "r.parquet", "--profile", profile_path, "--resume").out
    assert "2 points: 2 planned, 0 refused, 0 failed; 2 were finished before" in text


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"grid": {"policies": ["nemo"]}}, (), "grid.policies = 'policies': expected policy, or a field of"),
        (
            {"workload": {"random": 1}, "grid": {"model.hiden": [1]}},
            (),
            "model: hiden = 1: expected no such field",
        ),
        ({}, ("--backend", "spark"), "spark"),
        ({}, ("--jobs", "0"), "jobs"),
        ({}, ("--profile", "missing.parquet"), "cannot read the profile missing.parquet"),
        ({}, ("--out", "."), "--out = '.': expected a file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(cli, write_sweep, tmp_path, changes, arguments, message):
    result = cli("sweep", write_sweep(**changes), "--out", "r.parquet", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.slow
def test_the_example_is_planned_in_seconds(cli, tmp_path):
    result = cli("sweep", EXAMPLE, "--out", "r.parquet", "--json", "--jobs", 1)
    assert result.code == 0, result.err
    assert (result.json["points"], result.json["planned"], result.json["refused"]) == (63, 62, 1)
    assert result.json["failures"][0]["reason"].startswith("cluster.device.memory_bytes of testbed-a")


def start(sweep: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    # A shell's background jobs, and what they start, inherit that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from muxtune.cli.app import main; main()"
    command = [sys.executable, "-c", code, "sweep", str(sweep), "--out", str(out), "--jobs", "2", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def journalled(out: Path) -> dict[str, dict[str, object]]:
    path = out.with_name(f"{out.name}.journal")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {k: v for line in lines if line.endswith("\n") for k, v in json.loads(line).items()}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_sweep_that_was_ended_goes_on_where_it_was(cli, write_sweep, tmp_path, end):
    sweep, out = write_sweep(), tmp_path / "r.parquet"
    running = start(sweep, out)
    wait_until(lambda: len(journalled(out)) >= 6, 60)
    if end == signal.SIGKILL:
        running.kill()
    else:
        os.killpg(running.pid, end)  # as a terminal does
    _, err = running.communicate(timeout=30)
    assert running.returncode == (-9 if end == signal.SIGKILL else 130), err
    assert "Traceback" not in err
    assert not out.exists()
    before = journalled(out)
    assert 6 <= len(before) < 24

    resumed = start(sweep, out, "--resume", "--json")
    answer, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert (json.loads(answer)["reused"], json.loads(answer)["planned"]) == (len(before), 24)
    rows = pd.read_parquet(out)
    assert list(rows.point) == list(range(24))
    # A point that had been planned again would have taken another time.
    kept = rows.set_index("point_digest").planning_s.to_dict()
    assert {digest: kept[digest] for digest in before} == {d: o["planning_s"] for d, o in before.items()}

    assert cli("sweep", sweep, "--out", "whole.parquet", "--jobs", 1).code == 0
    expected = pd.read_parquet(tmp_path / "whole.parquet")
    pd.testing.assert_frame_equal(rows.drop(columns="planning_s"), expected.drop(columns="planning_s"))


def test_a_finished_sweep_is_not_replaced_unasked(cli, write_sweep, tmp_path):
    sweep = write_sweep(grid={"workload.random": [1], "policy": ["nemo"]})
    command = ("sweep", sweep, "--out", "r.parquet", "--jobs", 1, "--json")
    assert cli(*command).code == 0
    before = (tmp_path / "r.parquet").read_bytes()
    refused = cli(*command)
    assert refused.code == 2
    assert "expected --resume to add to the sweep in it, --force to replace it, or a new file" in refused.err
    assert (tmp_path / "r.parquet").read_bytes() == before
    assert cli(*command, "--resume").json["reused"] == 1
    assert cli(*command, "--force").json["reused"] == 0
