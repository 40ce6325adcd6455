"""The examples of docs/extending.md, as they stand there: each does what the page says of it."""

from __future__ import annotations

from types import ModuleType

import pytest

from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import candidate_meshes, plan_problem, structure_iteration_s
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload
from sim import search_plan, search_problem, simulate_operators, simulate_plan
from tests.documents import load_page
from tests.muxtune.planning.problems import make_problem
from tests.muxtune.policies.gpus import gpu_problem

PAGE = load_page("docs/extending.md")
NAMES = (
    "my_policies.py",
    "options.py",
    "order.py",
    "alignment.py",
    "meshes.py",
    "costs.py",
    "objective.py",
)
MOST_LINES = 40


def example(name: str) -> ModuleType:
    """The example as a module of somebody's own."""
    module = ModuleType(name.removesuffix(".py"))
    exec(compile(PAGE.example(name), name, "exec", dont_inherit=True), module.__dict__)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len(PAGE.example(name).splitlines()) <= MOST_LINES


def test_every_example_of_the_page_is_run():
    assert PAGE.text.count("<!-- example: ") == len(NAMES)


def test_a_fusion():
    plan = plan_problem(make_problem(), policy=example("my_policies.py").ByLength())[0]
    assert plan.policy == "ByLength"
    groups = [{plan.tasks_by_id[t].max_length for t in htask.task_ids} for htask in plan.htasks]
    assert sorted(map(tuple, groups)) == [(64,), (128,), (256,)]


def test_options():
    policy = example("options.py").Widths()
    for options, sizes in ((FREE, [1, 2, 2]), (PlanOptions(policy_options={"width": "4"}), [1, 4])):
        plan = plan_problem(make_problem(), policy=policy, options=options)[0]
        assert sorted(len(htask.task_ids) for htask in plan.htasks) == sizes
    assert plan.decisions.policy_options == {"width": 4}
    with pytest.raises(SpecError, match="--policy-option = 'height': expected one of width"):
        plan_problem(make_problem(), policy=policy, options=PlanOptions(policy_options={"height": 1}))


def test_a_pipeline_order():
    policy = example("order.py").OneMore()
    problem = gpu_problem(count=4)
    options = PlanOptions(tp=1, pp=4, dp=1)
    muxtune = search_problem(problem, options=options)
    own = search_problem(problem, policy=policy, options=options)
    assert own.predicted.iteration_s <= muxtune.predicted.iteration_s
    proposed = policy.propose(problem, options)
    declared = [structure for structure in proposed if structure.in_flight]
    assert len(declared) * 3 == len(proposed) * 2
    assert any(structure.injection for structure in proposed)

    class Declared:
        """The structures with one more alone; whether they are faster is for the search to say."""

        summary = "one more micro-batch in flight"

        def propose(self, problem, options):
            return [each for each in policy.propose(problem, options) if each.in_flight]

    more = plan_problem(problem, policy=Declared(), options=options)[0]
    assert more.in_flight == (5, 4, 3, 2)
    assert simulate_plan(more).predicted.iteration_s > 0


def test_an_alignment():
    policy = example("alignment.py").PadNearEqual()
    mixed = plan_problem(make_problem(), policy=policy)[0]
    equal = plan_problem(make_problem([{"max_length": 64}, {"max_length": 64}]), policy=policy)[0]
    assert {htask.alignment for htask in mixed.htasks} == {"chunk"}
    assert {htask.alignment for htask in equal.htasks} == {"pad"}
    with pytest.raises(SpecError, match=r"--alignment.* = 'pack': expected nothing: the policy lays out"):
        plan_problem(make_problem(), policy=policy, options=PlanOptions(alignment="pack"))


def test_meshes():
    policy = example("meshes.py").ShortPipelines()
    problem = make_problem(ranks=4)
    possible = candidate_meshes(problem.model, problem.cluster, FREE, idle=True)
    assert max(mesh.pp for mesh in possible) > 2
    assert max(mesh.tp for mesh in possible) == 1  # on CPUs
    proposed = {structure.mesh for structure in policy.propose(problem, FREE)}
    assert proposed
    assert all(mesh.pp <= 2 for mesh in proposed)
    found = plan_problem(problem, policy=policy)[0].parallelism
    assert (found.tp, found.pp, found.dp) in {(1, 2, 1), (1, 1, 1), (2, 1, 1)}


def test_cost_terms():
    busy = example("costs.py").BusyNetwork
    problem = gpu_problem("testbed-c", count=2)
    workload = Workload(tasks=tuple(problem.tasks))
    stock = search_problem(problem)
    costs = busy(problem.costs, factor=100.0)
    plan = search_plan(workload, problem.model, problem.cluster, costs)
    assert plan.parallelism.tp < stock.parallelism.tp
    assert plan.costs.digest != stock.costs.digest
    played = simulate_operators(plan, costs).predicted.iteration_s
    assert played == pytest.approx(plan.predicted.iteration_s, rel=1e-6)
    waiting = PlanningProblem(workload, problem.model, problem.cluster, busy(problem.costs, 1.0, 1e-3))
    assert plan_problem(waiting)[0].predicted.iteration_s > stock.predicted.iteration_s


def test_an_objective():
    module = example("objective.py")
    problem = gpu_problem(count=2)
    plan = search_problem(problem, options=module.PAID_BY_THE_SECOND)
    fast = search_problem(problem)
    assert plan.decisions.objective == "rank_seconds"
    paid = plan.parallelism.ranks * plan.predicted.iteration_s
    assert paid <= fast.parallelism.ranks * fast.predicted.iteration_s
    assert plan.parallelism.ranks < fast.parallelism.ranks
    assert module.structure_iteration_s is structure_iteration_s
