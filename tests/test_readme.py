"""Examples of README.md and docs/extending.md are right; the loop is played in tests/integration."""

from __future__ import annotations

import json
import re
from types import ModuleType

import pytest

from muxtune.plan import Decisions, Derived, HTaskDecision, MicrobatchShape, Parallelism, Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES, plan_problem
from muxtune.schedule import Action
from muxtune.support.errors import SpecError
from tests.documents import load_page
from tests.muxtune.planning.problems import make_problem

README = load_page("README.md")
EXTENDING = load_page("docs/extending.md")


def example(name: str) -> str:
    """An example of the README."""
    return README.example(name)


def test_the_python_example_is_about_fifteen_lines():
    assert sum(bool(line) for line in example("loop.py").splitlines()) <= 17


@pytest.fixture
def by_length(monkeypatch):
    """The policy of docs/extending.md under its name, in a registry that is as before afterwards."""
    module = ModuleType("my_policies")
    exec(EXTENDING.example("my_policies.py"), module.__dict__)
    assert re.search(r'^by-length = "my_policies:ByLength"$', EXTENDING.text, re.MULTILINE)
    POLICIES.names()  # entry points are loaded now, not into the copy
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    POLICIES.register("by-length")(module.ByLength)
    return POLICIES.get("by-length")


def test_the_policy_example_plans(by_length):
    plan = plan_problem(make_problem(), policy="by-length", options=PlanOptions())[0]
    assert plan.policy == "by-length"
    assert len(plan.htasks) == 3
    for htask in plan.htasks:
        assert len({plan.tasks_by_id[task_id].max_length for task_id in htask.task_ids}) == 1
    with pytest.raises(SpecError, match="by-length decides the fusion itself"):
        plan_problem(make_problem(), policy="by-length", options=PlanOptions(partition="t0+t1"))


def test_the_excerpt_of_a_plan_has_its_fields():
    excerpt = json.loads(example("plan.json"))
    assert excerpt.keys() <= Plan.model_fields.keys()
    decisions, derived = excerpt["decisions"], excerpt["derived"]
    assert decisions.keys() <= Decisions.model_fields.keys()
    assert derived.keys() <= Derived.model_fields.keys()
    Parallelism.model_validate(decisions["parallelism"])
    htasks = [HTaskDecision.model_validate(entry) for entry in decisions["htasks"]]
    assert len([MicrobatchShape.model_validate(entry) for entry in derived["htasks"]]) == len(htasks)
    actions = [[Action(*entry) for entry in stage] for stage in derived["schedule"]]
    assert [len(stage) for stage in actions] == [8, 8]
    assert {action.htask for action in actions[0]} == set(range(len(htasks)))
