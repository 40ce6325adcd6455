"""Parts of muxtune switched off."""

from __future__ import annotations

import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES, plan_problem
from muxtune.policies.switches import decided, label
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import FakeCosts, make_problem


def without(*parts: str, **fixed: object) -> PlanOptions:
    return PlanOptions(without=parts, **fixed)  # type: ignore[arg-type]


def test_no_fusion_leaves_every_task_alone():
    plan = plan_problem(make_problem(), options=without("fusion"))[0]
    assert sorted(h.task_ids for h in plan.htasks) == [(f"t{i}",) for i in range(5)]
    assert {h.instance for h in plan.htasks} == {0}
    assert plan.policy == "muxtune-no-fusion"


def test_no_chunking_pads_and_still_fuses():
    plan = plan_problem(make_problem(costs=FakeCosts(launch_s=1e-2)), options=without("chunking"))[0]
    assert {h.alignment for h in plan.htasks} == {"pad"}
    assert len(plan.htasks) < 5  # launches dominate
    assert plan.policy == "muxtune-no-chunking"


def test_no_orchestration_runs_operators_one_after_another():
    plan = plan_problem(make_problem(), options=without("orchestration"))[0]
    assert plan.orchestration.mode == "sequential"
    assert plan.policy == "muxtune-no-orchestration"


def test_parts_can_be_switched_off_together():
    plan = plan_problem(make_problem(), options=without("chunking", "fusion"))[0]
    assert len(plan.htasks) == 5
    assert {h.alignment for h in plan.htasks} == {"pad"}
    assert plan.policy == "muxtune-no-fusion-no-chunking"


@pytest.mark.parametrize("part", ["fusion", "orchestration", "chunking"])
def test_a_policy_for_comparisons_is_muxtune_with_the_switch(part):
    problem = make_problem()
    switched = plan_problem(problem, options=without(part))[0]
    named = plan_problem(problem, policy=f"muxtune-no-{part}")[0]
    assert named == switched


@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("part", ["fusion", "orchestration", "chunking"])
def test_nothing_gets_faster_without_a_part(part, launch_s):
    problem = make_problem(costs=FakeCosts(launch_s=launch_s))
    whole = plan_problem(problem)[0].predicted.iteration_s
    assert plan_problem(problem, options=without(part))[0].predicted.iteration_s >= whole * (1 - 1e-9)


def test_what_is_switched_off_cannot_be_decided_too():
    with pytest.raises(SpecError, match="--partition = 'a,b': expected nothing beside --no-fusion"):
        decided(without("fusion", partition="a,b"), ["a", "b"])
    with pytest.raises(SpecError, match="--alignment = 'pack': expected nothing beside --no-chunking"):
        decided(without("chunking", alignment="pack"), ["a", "b"])
    with pytest.raises(SpecError, match="--alignment = '--chunk-tokens 64': expected nothing beside"):
        decided(without("chunking", chunk_tokens=64), ["a", "b"])
    assert decided(without("chunking", alignment="pad"), ["a"]).alignment == "pad"


@pytest.mark.parametrize("policy", [name for name in POLICIES.names() if name != "muxtune"])
def test_only_muxtune_has_switches(policy):
    with pytest.raises(SpecError, match=rf"--no-chunking = True: expected policy muxtune; {policy} has no"):
        plan_problem(make_problem(), policy=policy, options=without("chunking"))


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (
            "nemo",
            PlanOptions(orchestration="intra"),
            "--orchestration = 'intra': expected policy muxtune; nemo has an order",
        ),
        (
            "muxtune",
            PlanOptions(orchestration="intra", without=("orchestration",)),
            "--orchestration = 'intra': expected nothing beside --no-orchestration",
        ),
    ],
    ids=["policy", "switch"],
)
def test_an_order_inside_of_stages_is_forced_on_muxtune_alone(policy, options, message):
    with pytest.raises(SpecError, match=message):
        plan_problem(make_problem(), policy=policy, options=options)


def test_names_list_parts_in_one_order():
    assert label("muxtune", without("chunking", "orchestration", "fusion")) == (
        "muxtune-no-fusion-no-orchestration-no-chunking"
    )
    assert label("nemo", PlanOptions()) == "nemo"
