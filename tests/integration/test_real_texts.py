"""The whole loop, command by command, on real texts: SST-2, OpenBookQA and RTE, two tasks each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ROOT.parent / "shared" / "data" / "text"
STEPS = 4

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not TEXTS.is_dir(), reason="needs ../shared/data/text with the three JSONL files"),
]


@pytest.fixture
def muxtune(tmp_path, command, monkeypatch, brief_measurements) -> Callable[..., dict[str, object]]:
    """Runs a command with --json in the folder of the test; its one object."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> dict[str, object]:
        done = command(*arguments, "--json")
        assert done.code == 0, done.err
        return done.json

    return run


def test_six_tasks_on_real_texts_go_through_the_whole_loop(tmp_path, muxtune):
    shutil.copy(ROOT / "examples" / "real-texts.yaml", tmp_path / "workload.yaml")
    (tmp_path / "texts").symlink_to(TEXTS)

    profile = ("--model", "llama-tiny", "--device", "cpu", "--quick", "--out", "profile.parquet")
    muxtune("profile", *profile)
    assert (tmp_path / "profile.parquet").exists()
    plan_options = ("--workload", "workload.yaml", "--cluster", "cpu-2", "--profile", "profile.parquet")
    muxtune("plan", *plan_options, "--out", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sorted(t for h in plan["decisions"]["htasks"] for t in h["task_ids"]) == sorted(
        t["id"] for t in plan["decisions"]["tasks"]
    )
    simulated = muxtune("simulate", "plan.json", "--gantt", "gantt.png", "--trace", "trace.json")
    assert simulated.keys() == plan["predicted"].keys()
    assert simulated["iteration_s"] == pytest.approx(plan["predicted"]["iteration_s"], rel=1e-9)

    ran = muxtune("run", "plan.json", "--out", "run", "--steps", STEPS)
    assert ran["steps"] == STEPS
    validated = muxtune("validate", "plan.json", "run", "--solo-steps", "2")
    assert float(str(validated["max_loss_difference"])) < 1e-5
    tasks = validated["tasks"]
    assert isinstance(tasks, list)
    assert len(tasks) == 6
    for task in tasks:
        assert task["last_loss"] < task["first_loss"] - 0.3, task["task_id"]
