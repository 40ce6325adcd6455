"""Plans stay what they were, unless a change says why they do not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.golden_plans import differences, plan_record

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_plans.json").read_text())


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_plan_of_before_is_the_plan_of_today(seed):
    assert differences(GOLDEN[seed], plan_record(int(seed))) == []


def test_golden_plans_are_of_all_kinds():
    plans = [record["decisions"] for record in GOLDEN.values() if "decisions" in record]
    assert {plan["template"] for plan in plans} <= {"continuous", "flush"}  # flush where memory is short
    assert {plan["orchestration"] for plan in plans} > {"sequential"}
    assert any(plan["parallelism"]["dp"] > 1 for plan in plans)
    assert any(plan["parallelism"]["tp"] > 1 for plan in plans)
    assert any(htask["carry_microbatches"] > 1 for plan in plans for htask in plan["htasks"])
    assert 0 < len(GOLDEN) - len(plans) < len(plans)


def test_any_change_is_a_difference():
    seed = next(seed for seed, record in GOLDEN.items() if "decisions" in record)
    changed = copy.deepcopy(GOLDEN[seed])
    changed["predicted"]["iteration_s"] *= 1 + 1e-11
    changed["predicted"]["fwd_s"][0][0] *= 1 + 1e-13
    changed["decisions"]["htasks"][0]["task_ids"].append("x")
    lines = differences(GOLDEN[seed], changed)
    assert [line.partition(":")[0] for line in lines] == [
        "decisions.htasks.0.task_ids",
        "predicted.iteration_s",
    ]
    assert differences(GOLDEN[seed], {"refused": []})
