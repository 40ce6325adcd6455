"""The demonstration's wiring, with a made-up profile and few steps."""

from __future__ import annotations

import shlex

import pytest
import yaml

from experiments.demo import DemoReport, run_demo
from muxtune.cli.app import main
from muxtune.costs import load_profile
from muxtune.costs.kept import kept_profile_path
from muxtune.model import PRESETS
from muxtune.plan import load_plan
from muxtune.support.errors import SpecError
from muxtune.support.invocation import program_name


@pytest.mark.slow
@pytest.mark.integration
def test_demo_runs_the_whole_loop_and_replaces_an_earlier_one(
    tmp_path, made_up_profile, quick_ranks, monkeypatch
):
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    out.mkdir()
    for left_over in (".muxtune-demo", "stale.json"):
        (out / left_over).touch()
    report = run_demo(out, steps=3, baseline_steps=2, solo_steps=1)
    assert not (out / "stale.json").exists()
    assert [result.policy for result in report.comparison.policies] == ["muxtune", "nemo"]
    assert report.comparison.measured_speedup["muxtune"] > 0
    assert {task.steps for task in report.validation.tasks} == {3}
    assert report.validation.max_loss_difference == pytest.approx(0, abs=1e-5)
    assert DemoReport.model_validate_json((out / "report.json").read_text()) == report
    assert (out / "report.md").read_text() == report.to_markdown() + "\n"
    # What it says to type next: its own workload has measured costs from now on.
    assert f"    {program_name()} compare --workload {out}/workload.yaml" in report.to_markdown()
    assert load_profile(kept_profile_path(PRESETS["llama-tiny"], 2)) == load_profile(out / "profile.parquet")
    for words in report.next_commands:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(words))
        assert ended.value.code == 0
    assert load_plan(out / "plan-2.json").costs.kind == "measured"
    for name in ("gantt.png", "gantt-nemo.png", "plan.json", "profile.parquet", "trace-simulated.json"):
        assert (out / name).stat().st_size > 0
    tasks = yaml.safe_load((out / "workload.yaml").read_text())["tasks"]
    assert len(tasks) == 8
    assert len({task["max_length"] for task in tasks}) == 3
    assert len({task["peft"]["r"] for task in tasks}) == 4
    assert len({task["global_batch_size"] for task in tasks}) == 3


def test_demo_replaces_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SpecError, match="expected a new or empty folder, or that of an earlier demo"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
