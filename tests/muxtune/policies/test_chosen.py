"""Policies by name or as objects, and options of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from experiments.comparison import run_comparison
from muxtune.cli.app import app
from muxtune.orchestration import Mode
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.policies import POLICIES, choose_policy, fixed_partition, plan_problem, plan_workload
from muxtune.support.errors import SpecError, UserError
from muxtune.support.registry import PluginError
from muxtune.tasks import Workload
from sim import search_plan, search_problem
from tests.documents import ROOT
from tests.muxtune.planning.problems import make_problem
from tests.muxtune.policies.gpus import gpu_problem


class Widths:
    """hTasks of so many tasks, in the order of the workload."""

    summary = "so many tasks per hTask"

    class Options(BaseModel):
        width: int = Field(default=2, ge=1, description="tasks per hTask")
        order: Literal["first", "last"] = "first"

    def propose(self, problem, options):
        width, ids = options.policy_options.width, list(problem.data)
        if options.policy_options.order == "last":
            ids.reverse()
        groups = [tuple(ids[i : i + width]) for i in range(0, len(ids), width)]
        return fixed_partition(problem, options, groups)


def sizes(plan):
    return sorted(len(htask.task_ids) for htask in plan.htasks)


def test_calls_take_an_object_as_they_take_a_name():
    problem = make_problem()
    workload = Workload(tasks=tuple(problem.tasks))
    inputs = (workload, problem.model, problem.cluster, problem.costs)
    plans = [
        plan_problem(problem, policy=Widths())[0],
        plan_workload(*inputs, policy=Widths())[0],
        search_problem(problem, policy=Widths()),
        search_plan(*inputs, policy=Widths()),
    ]
    assert {plan.policy for plan in plans} == {"Widths"}
    assert {tuple(sizes(plan)) for plan in plans} == {(1, 2, 2)}
    compared = run_comparison(problem, ["nemo", Widths()])
    assert [result.policy for result in compared.policies] == ["nemo", "Widths"]
    assert set(compared.predicted_speedup) == {"nemo", "Widths"}


def test_an_object_may_have_a_name():
    policy = Widths()
    policy.name = "widths-of-mine"
    assert plan_problem(make_problem(), policy=policy)[0].policy == "widths-of-mine"


@pytest.mark.parametrize("policy", [Widths, object(), None, 3])
def test_what_is_no_policy_is_refused_in_a_line(policy):
    with pytest.raises(SpecError, match=r"policy = .*: expected the name of a policy, or an object") as e:
        plan_problem(make_problem(), policy=policy)
    assert "\n" not in str(e.value)


def test_a_failing_object_is_named_by_its_class():
    class Failing:
        def propose(self, problem, options):
            raise KeyError("none")

    with pytest.raises(PluginError, match=r"the policy 'Failing' of tests.*:Failing: propose raised KeyErr"):
        plan_problem(make_problem(), policy=Failing())


def asking(**values):
    return PlanOptions(policy_options=values)


def test_options_are_typed_and_have_defaults():
    problem = make_problem()
    assert sizes(plan_problem(problem, policy=Widths())[0]) == [1, 2, 2]
    assert sizes(plan_problem(problem, policy=Widths(), options=asking(width="4"))[0]) == [1, 4]
    model = PlanOptions(policy_options=Widths.Options(width=5))
    assert sizes(plan_problem(problem, policy=Widths(), options=model)[0]) == [5]
    last = plan_problem(problem, policy=Widths(), options=asking(width=4, order="last"))[0]
    assert last.decisions.policy_options == {"width": 4, "order": "last"}
    assert {("t0",), ("t4", "t3", "t2", "t1")} == {htask.task_ids for htask in last.htasks}


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        (Widths(), {"wdith": "2"}, r"--policy-option = 'wdith': expected one of width, order"),
        (Widths(), {"width": "two"}, r"--policy-option width = 'two': expected a valid integer"),
        (Widths(), {"width": "0"}, r"--policy-option width = '0': expected greater than or equal to 1"),
        (Widths(), {"order": "any"}, r"--policy-option order = 'any': expected 'first' or 'last'"),
        (Widths(), 3, r"--policy-option = 3: expected values by key"),
        ("muxtune", {"width": "2"}, r"--policy-option = 'width': expected nothing: muxtune has no options"),
    ],
)
def test_a_wrong_option_is_refused_in_a_line(policy, given, message):
    with pytest.raises(SpecError, match=message) as caught:
        plan_problem(make_problem(), policy=policy, options=PlanOptions(policy_options=given))
    assert "\n" not in str(caught.value)


def test_an_option_without_a_default_has_to_be_given():
    class Asking(Widths):
        class Options(BaseModel):
            width: int
            order: str = "first"

    with pytest.raises(SpecError, match="--policy-option width = None: expected a value"):
        plan_problem(make_problem(), policy=Asking())


def test_options_that_are_no_model_are_the_policys_fault():
    class Wrong(Widths):
        Options = dict

    with pytest.raises(PluginError, match=r"'Wrong' of tests.*: Options is no pydantic model"):
        plan_problem(make_problem(), policy=Wrong())


@dataclass
class Everything:
    """All tasks fused; follows ``orchestration`` or does not."""

    follows: bool
    summary: str = "a policy of another package"

    def propose(self, problem, options):
        if not self.follows:
            options = replace(options, orchestration=None)
        return fixed_partition(problem, options, [(task_id,) for task_id in problem.data])


@pytest.mark.parametrize("mode", ["sequential", "intra", "round-robin", "interleaved"])
def test_an_outside_policy_may_be_asked_for_an_orchestration(mode: Mode):
    options = replace(FREE, orchestration=mode, tp=2)
    plan = search_problem(gpu_problem(count=3), policy=Everything(follows=True), options=options)
    assert plan.orchestration.mode == mode
    assert plan.overlaps == (mode != "sequential")


def test_one_that_does_not_follow_says_what_it_proposes():
    options = replace(FREE, orchestration="intra", tp=2)
    message = "--orchestration = 'intra': expected sequential, which is what Everything proposes"
    with pytest.raises(SpecError, match=message):
        plan_problem(gpu_problem(count=3), policy=Everything(follows=False), options=options)


@pytest.fixture
def registered(monkeypatch):
    POLICIES.names()
    monkeypatch.setitem(POLICIES._entries, "widths", Widths())


def muxtune(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def test_the_command_lists_options(registered):
    listed = muxtune("policies")
    assert "--policy-option width=... (int, default 2): tasks per hTask" in listed.output
    assert "--policy-option order=... (Literal['first', 'last'], default first)" in listed.output
    assert '"name":"width","type":"int","default":"2","description":"tasks per hTask"' in (
        muxtune("policies", "--json").output.replace('": ', '":').replace(', "', ',"')
    )


WORKLOAD = ROOT / "examples" / "eight-tenants.yaml"
PLAN = ("plan", "--workload", WORKLOAD, "--cluster", "testbed-a", "--policy", "widths")


def test_the_command_gives_options_to_the_policy(registered, tmp_path):
    out = tmp_path / "plan.json"
    planned = muxtune(*PLAN, "--policy-option", "width=4", "--policy-option", "order=last", "--out", out)
    assert planned.exit_code == 0, planned.output
    assert out.read_text().count('"task_ids"') == 2


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["width"], "--policy-option = 'width': expected KEY=VALUE"),
        (["width=1", "width=2"], "--policy-option = 'width=2': expected width once"),
        (["depth=1"], "--policy-option = 'depth': expected one of width, order"),
    ],
)
def test_the_command_refuses_in_a_line(registered, pairs, message):
    flags = [word for pair in pairs for word in ("--policy-option", pair)]
    refused = muxtune(*PLAN, *flags)
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == message


def test_the_names_of_the_registry_are_chosen_as_before():
    assert choose_policy("muxtune").ours
    assert not choose_policy(Widths()).ours
    with pytest.raises(UserError, match="did you mean 'muxtune'"):
        choose_policy("muxtun")
