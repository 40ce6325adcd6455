"""Whole sweeps: rows, failures, order, and what a resumed sweep keeps."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pyarrow.parquet as pq
import pytest

from experiments.sweep import run_sweep
from experiments.sweep.journal import journal_path, open_journal
from experiments.sweep.run import BATCH_POINTS, make_batches
from muxtune.plan import Predicted
from muxtune.policies.base import POLICIES
from muxtune.support.errors import UserError
from tests.experiments.sweep.sweeps import FakeSource, write_sweep

GRID = {
    "policy": ["muxtune", "nemo", "sl-peft"],
    "workload.tasks[*].micro_batch_size": [2, 4, 3],
    "options.template": ["flush", None],
    "options.pp": [2],  # messages of the made-up costs are so dear that one stage would win
}


def sweep(folder, out="r.parquet", **fields):
    settings = {k: fields.pop(k) for k in ("jobs", "resume", "costs_digest", "source") if k in fields}
    path = write_sweep(folder, **({"grid": GRID} | fields))
    return run_sweep(path, folder / out, **({"source": FakeSource(), "jobs": 1} | settings))


def rows(folder, out="r.parquet") -> pd.DataFrame:
    return pq.read_table(folder / out).to_pandas()


def test_every_point_has_a_row_with_its_fields_and_its_plan(tmp_path):
    summary = sweep(tmp_path)
    found = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["point"] for row in found] == list(range(18))
    assert (summary.points, summary.planned, summary.refused, summary.failed) == (18, 12, 6, 0)
    row = found[2]
    assert (row["policy"], row["workload.tasks[*].micro_batch_size"], row["options.template"]) == (
        "muxtune",
        4,
        "flush",
    )
    assert (row["model_name"], row["cluster_name"], row["ranks"], row["tasks"]) == (
        "llama-tiny",
        "cpu-2",
        2,
        2,
    )
    assert (row["status"], row["template"], row["pp"], row["costs"]) == ("planned", "flush", 2, "fake")
    assert sorted(row["partition"].replace("+", ",").split(",")) == ["a", "b"]
    assert row["htasks"] == len(row["alignments"]) == sum(map(len, row["buckets"])) == len(row["fwd_s"][0])
    assert set(Predicted.model_fields) <= row.keys()
    assert row["max_peak_memory_bytes"] == max(row["peak_memory_bytes"])
    assert row["iteration_s"] >= row["lower_bound_s"] > 0
    assert row["planning_s"] > 0
    assert not journal_path(tmp_path / "r.parquet").exists()


def test_points_without_a_plan_say_why_and_stop_nothing(tmp_path):
    summary = sweep(
        tmp_path,
        grid={"cluster.ranks": [2, 3], "cluster.device.memory_bytes": [10**9, 1000]},
        list=[{"workload.tasks[7].steps": 1}],
    )
    found = rows(tmp_path)
    assert list(found.status) == ["planned", "refused", "refused", "refused", "refused"]
    assert pd.isna(found.failure[0])
    assert found.failure[1].startswith("cluster.device.memory_bytes of cpu-2 = 1000 bytes: expected at least")
    assert found.failure[2] == "no costs of three ranks"
    assert "expected an id, or a position below 2" in found.failure[4]
    assert found.iteration_s.isna().sum() == 4
    assert [(failure.points) for failure in summary.failures] == [2, 1, 1]


def test_a_policy_that_breaks_is_a_row_too(tmp_path, monkeypatch):
    class Broken:
        summary = "breaks"

        def propose(self, problem, options):
            raise IndexError("list index\nout of range")

    monkeypatch.setitem(POLICIES._entries, "broken", Broken())
    summary = sweep(tmp_path, grid={"policy": ["broken", "nemo"]})
    assert (summary.planned, summary.failed) == (1, 1)
    failure = rows(tmp_path).failure[0]
    assert failure.startswith(f"the policy 'broken' of {__name__}:Broken: propose raised IndexError: ")
    assert "IndexError: list index out of range (test_run.py:" in failure
    monkeypatch.setitem(POLICIES._entries, "broken", POLICIES.get("sl-peft"))
    summary = sweep(tmp_path, grid={"policy": ["broken", "nemo"]}, resume=True)
    assert (summary.planned, summary.reused) == (2, 1)


def test_two_jobs_write_the_rows_of_one(tmp_path):
    sweep(tmp_path, "one.parquet")
    sweep(tmp_path, "two.parquet", jobs=2)
    one, two = (rows(tmp_path, name).drop(columns="planning_s") for name in ("one.parquet", "two.parquet"))
    pd.testing.assert_frame_equal(one, two)


def test_equal_points_are_planned_once(tmp_path):
    summary = sweep(tmp_path, grid={"policy": ["nemo"]}, list=[{"policy": "nemo", "options.pp": None}])
    assert summary.points == 2
    assert rows(tmp_path).planning_s.nunique() == 1


def test_values_of_different_types_become_json(tmp_path):
    peft = {"method": "lora", "r": 2, "alpha": 2, "targets": ["all-linear"]}
    sweep(
        tmp_path,
        grid={"workload.tasks[*].peft": [peft, peft | {"r": 4}], "workload.tasks[*].learning_rate": [1, 0.5]},
    )
    found = rows(tmp_path)
    assert found["workload.tasks[*].peft"][2] == (
        '{"method": "lora", "r": 4, "alpha": 2, "targets": ["all-linear"]}'
    )
    assert list(found["workload.tasks[*].learning_rate"]) == [1.0, 0.5, 1.0, 0.5]


def test_resuming_a_whole_result_plans_only_what_was_added(tmp_path):
    sweep(tmp_path, grid={"policy": ["nemo"]})
    before = rows(tmp_path)
    summary = sweep(tmp_path, grid={"policy": ["muxtune", "nemo"]}, resume=True)
    after = rows(tmp_path)
    assert (summary.points, summary.reused) == (2, 1)
    assert list(after.policy) == ["muxtune", "nemo"]
    kept = after.iloc[1:].reset_index(drop=True).drop(columns="point")
    pd.testing.assert_frame_equal(kept, before.drop(columns="point"))


def test_resuming_another_sweep_is_refused(tmp_path):
    sweep(tmp_path, grid={"policy": ["nemo", "muxtune"]})
    changed = r"--resume: 1 of the 2 finished points of .*r\.parquet are not in .*sweep\.yaml any more"
    with pytest.raises(UserError, match=changed):
        sweep(tmp_path, grid={"policy": ["nemo", "sl-peft"]}, resume=True)
    with pytest.raises(UserError, match="2 of the 2 finished points"):
        sweep(tmp_path, grid={"policy": ["nemo", "muxtune"]}, resume=True, costs_digest="another profile")


def test_an_interrupted_sweep_is_not_begun_again_by_chance(tmp_path):
    journal = journal_path(tmp_path / "r.parquet")
    with open_journal(journal) as opened:
        opened.append({"digest": {"status": "planned"}})
    with pytest.raises(UserError, match="has 1 finished points of an interrupted sweep: expected --resume"):
        sweep(tmp_path)
    assert journal.exists()


def test_what_is_no_result_cannot_be_resumed(tmp_path):
    (tmp_path / "r.parquet").write_text("rows")
    with pytest.raises(UserError, match="is not the result of a sweep"):
        sweep(tmp_path, resume=True)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(UserError, match="is not the result of a sweep"):
        sweep(tmp_path, resume=True)
    assert not journal_path(tmp_path / "r.parquet").exists()


def test_batches_keep_problems_together_and_all_workers_busy():
    inputs = {str(i): _Inputs(i // 40) for i in range(80)}
    batches = make_batches(inputs, workers=2)
    assert [digest for batch in batches for digest in batch.digests] == list(inputs)
    assert max(len(batch.digests) for batch in batches) == BATCH_POINTS
    assert all(len({each.workload for each in batch.inputs}) == 1 for batch in batches)
    assert len(make_batches(dict(list(inputs.items())[:8]), workers=2)) == 8


class _Inputs:
    def __init__(self, problem):
        self.workload, self.model, self.cluster = problem, "model", "cluster"


def test_planning_needs_no_torch():
    code = """
import sys, tempfile
from pathlib import Path
from experiments.sweep import run_sweep
from muxtune.api.sweep_costs import FoundCosts
folder = Path(tempfile.mkdtemp())
sweep = "{workload: {random: 1, count: 2}, model: llama2-7b, cluster: testbed-a, list: [{}]}"
(folder / "s.yaml").write_text(sweep)
assert run_sweep(folder / "s.yaml", folder / "r.parquet", source=FoundCosts(None), jobs=1).planned == 1
loaded = [name for name in ("torch", "transformers", "peft", "matplotlib", "scipy") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
