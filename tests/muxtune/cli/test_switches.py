"""``muxtune plan`` with parts of the policy switched off."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def plan(cli, write_workload, profile_path, tmp_path):
    def run(*arguments: object):
        result = cli("plan", "--workload", write_workload(), "--profile", profile_path, *arguments)
        plan_file = tmp_path / "plan.json"
        return result, json.loads(plan_file.read_text()) if plan_file.exists() else None

    return run


def test_switches_are_obeyed_and_written_into_the_plan(plan):
    result, written = plan("--no-fusion", "--no-chunking", "--no-orchestration")
    assert result.code == 0, result.err
    assert written["decisions"]["policy"] == "muxtune-no-fusion-no-orchestration-no-chunking"
    assert [len(htask["task_ids"]) for htask in written["decisions"]["htasks"]] == [1, 1, 1]
    assert {htask["alignment"] for htask in written["decisions"]["htasks"]} == {"pad"}
    assert written["decisions"]["orchestration"]["mode"] == "sequential"
    assert "muxtune-no-fusion" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-fusion", "--policy", "nemo"], "--no-fusion = True: expected policy muxtune"),
        (["--no-fusion", "--partition", "a+b,c"], "expected nothing beside --no-fusion"),
        (["--no-chunking", "--alignment", "chunk"], "expected nothing beside --no-chunking, which pads"),
        (["--no-chunking", "--chunk-tokens", 64], "expected nothing beside --no-chunking, which pads"),
    ],
)
def test_contradictions_end_with_one_line(plan, arguments, message):
    result, written = plan(*arguments)
    assert (result.code, result.out, written) == (2, "", None)
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
