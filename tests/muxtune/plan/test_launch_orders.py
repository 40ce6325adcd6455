"""Launch orders in plan.json: written, read, and refused where they do not fit."""

import json
import re

import pytest

from muxtune.orchestration import LaunchOrder
from muxtune.plan import Plan, check_plan, clock_launches, load_plan, save_plan
from muxtune.support.errors import SpecError
from tests.plans import make_plan
from tests.sim.plans import launched_plan, orchestrated_plan


@pytest.fixture
def content():
    """A plan with launch orders, on two stages of two ranks."""
    return json.loads(launched_plan("interleaved").model_dump_json())


def refused(content, match):
    with pytest.raises(SpecError, match=re.escape(match)):
        check_plan(Plan.model_validate(content))


def test_a_plan_says_how_every_clock_is_launched(tmp_path):
    plan = launched_plan("interleaved")
    listed = [(clock.kind, clock.htasks) for clock in plan.orchestration.launches]
    assert listed == [("F", (0, 2)), ("B", (0, 2)), ("F", (1,)), ("B", (1,))]
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").orchestration.launches == plan.orchestration.launches


def test_nothing_is_said_where_nothing_overlaps():
    assert make_plan().orchestration.launches == ()
    assert launched_plan("sequential").orchestration.launches == ()


def test_plans_without_orders_are_still_plans():
    check_plan(orchestrated_plan("interleaved"))


def test_stages_that_are_alike_share_an_entry():
    order = LaunchOrder("none", ((0, 0), (0, 1)), ((0, 0),))
    other = LaunchOrder("none", ((0, 0),), ((0, 0),))
    launches = clock_launches("F", (3,), [order, other, order])
    assert [each.stages for each in launches.orders] == [(0, 2), (1,)]
    assert launches.on_stage(2) == order
    assert launches.on_stage(1) == other


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("stages", [1], "launches[1].orders.stages = [1, 1]: expected every stage from 0 to 1 once"),
        ("stages", [0, 1], "launches[1].orders.stages = [0, 1, 1]: expected every stage"),
        ("compute", "0:0 nonsense", "launch order = 'nonsense': expected HTASK:NUMBER"),
        ("compute", "0:0-1", "launches[1].orders[0]: compute = '0:0-1': expected every subgraph once"),
        ("communication", "0:0", "communication = '0:0': expected every subgraph once"),
    ],
)
def test_orders_that_do_not_fit_are_refused(content, field, value, match):
    content["derived"]["launches"][1]["orders"][0][field] = value
    refused(content, match)


def test_orders_that_cannot_run_are_refused(content):
    order = content["derived"]["launches"][0]["orders"][0]
    order["communication"] = " ".join(reversed(order["communication"].split()))
    refused(content, "launches[0].orders[0]: launch order = ")


def test_missing_and_needless_clocks_are_refused(content):
    needless = json.loads(launched_plan("sequential").model_dump_json())
    needless["derived"]["launches"] = content["derived"]["launches"]
    refused(needless, "expected nothing: no clock overlaps (tp 2, sequential)")
    content["derived"]["launches"].pop(2)
    refused(content, "expected nothing, or F of [0, 2], B of [0, 2], F of [1], B of [1], once each")


def test_unknown_barriers_are_refused(content):
    content["derived"]["launches"][0]["orders"][0]["barrier"] = "wall"
    with pytest.raises(ValueError, match="barrier"):
        Plan.model_validate(content)
