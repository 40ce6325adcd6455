"""Objectives: what is chosen is small in what was asked for, and the plan says what that was."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from muxtune.cli.app import app
from muxtune.plan import load_plan
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.problem.memory_limit import MemoryLimit
from muxtune.planning.problem.meshes import candidate_meshes
from muxtune.planning.problem.objectives import (
    find_objective,
    makespan_s,
    peak_bytes,
    slowest_tenant_s_per_token,
)
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import aligned_groups, pipeline_candidates
from muxtune.policies import fixed_partition, plan_problem
from muxtune.support.errors import SpecError
from muxtune.support.registry import PluginError
from muxtune.tasks import Workload
from sim import search_problem
from tests.documents import ROOT
from tests.muxtune.planning.problems import FakeCosts, make_problem
from tests.muxtune.policies.gpus import gpu_problem

MEMORY = PlanOptions(objective="memory")
TENANT = PlanOptions(objective="slowest-tenant")


def every_structure(problem: PlanningProblem):
    """All partitions on all meshes, packed and padded, in all groupings and templates; those that fit."""
    ids = list(problem.data)
    shapes = candidate_meshes(problem.model, problem.cluster, FREE, idle=True)
    for partition, shape, alignment in itertools.product(
        set_partitions(len(ids)), shapes, ("pack", "pad", "chunk")
    ):
        groups = [tuple(ids[t] for t in range(len(ids)) if mask >> t & 1) for mask in partition]
        options = replace(FREE, alignment=alignment, **shape._asdict())
        htasks, mesh = aligned_groups(problem, options, groups)
        yield from MemoryLimit(problem).fitting(
            pipeline_candidates(problem, htasks, mesh, ("flush", "continuous"))
        )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_other_structure_needs_less_memory(ranks):
    problem = make_problem(MIXED_STEPS[:4], ranks=ranks)
    plan = search_problem(problem, options=MEMORY)
    least = min(peak_bytes(problem, structure) for structure in every_structure(problem))
    assert max(plan.predicted.peak_memory_bytes) <= least
    assert plan.decisions.objective == "memory"


def test_less_memory_is_had_for_more_time():
    problem = gpu_problem(count=4)
    fast, lean = (search_problem(problem, options=options) for options in (FREE, MEMORY))
    assert max(lean.predicted.peak_memory_bytes) < 0.8 * max(fast.predicted.peak_memory_bytes)
    assert lean.predicted.iteration_s > fast.predicted.iteration_s
    assert fast.decisions.objective == "iteration"


def test_no_policy_that_shares_the_backbone_needs_less():
    problem = gpu_problem(count=8)
    own, *others = (
        max(search_problem(problem, policy=policy, options=MEMORY).predicted.peak_memory_bytes)
        for policy in ("muxtune", "temporal-only", "spatial-only", "sl-peft")
    )
    assert own <= min(others)


MIXED_STEPS = (
    {"max_length": 256, "dataset": {"lengths": "rte"}, "steps": 2, "micro_batch_size": 8},
    {"max_length": 64, "steps": 40, "global_batch_size": 4, "micro_batch_size": 4},
    {"max_length": 64, "steps": 3, "global_batch_size": 16, "micro_batch_size": 4},
    {"max_length": 128, "dataset": {"lengths": "openbookqa"}, "steps": 5},
    {"max_length": 64, "steps": 20},
)


def structures_of(problem, options):
    return fixed_partition(problem, options, [(task_id,) for task_id in problem.data])


def test_the_slowest_tenant_is_served_better_than_by_the_shortest_iteration():
    problem = make_problem(MIXED_STEPS[:2], ranks=1, costs=FakeCosts(launch_s=1e-3))
    plans = [search_problem(problem, options=options) for options in (FREE, TENANT)]
    assert [len(plan.htasks) for plan in plans] == [1, 2]  # fused, the small one pays for the large one
    assert plans[1].decisions.objective == "slowest-tenant"
    assert plans[1].predicted.iteration_s > plans[0].predicted.iteration_s


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_other_structure_serves_the_slowest_tenant_better(ranks):
    problem = make_problem(MIXED_STEPS[:4], ranks=ranks)
    chosen: list[float] = []

    def watched(problem, structure):
        chosen.append(slowest_tenant_s_per_token(problem, structure))
        return chosen[-1]

    plan_problem(problem, options=PlanOptions(objective=watched))
    least = min(slowest_tenant_s_per_token(problem, structure) for structure in every_structure(problem))
    assert min(chosen) <= 1.01 * least


def test_tenants_of_equal_steps_are_served_best_by_the_shortest_iteration():
    problem = make_problem()
    fast, tenant = (search_problem(problem, options=options) for options in (FREE, TENANT))
    assert tenant.predicted.iteration_s <= fast.predicted.iteration_s * (1 + 1e-9)


def test_a_tenants_time_is_that_of_the_phases_it_lives_through():
    problem = make_problem(MIXED_STEPS[:2], ranks=1)
    structure = structures_of(problem, replace(FREE, template="flush"))[0]
    both = find_objective("iteration").score(problem, structure)
    small = make_problem(MIXED_STEPS[1:2], ranks=1)
    alone = find_objective("iteration").score(small, structures_of(small, replace(FREE, template="flush"))[0])
    tokens = sum(small.data["t0"].batch_lengths(step).sum() for step in range(40))
    large = problem.data["t0"]
    own = sum(large.batch_lengths(step).sum() for step in range(2))
    expected = max((2 * both + 38 * alone) / tokens, 2 * both / own)
    assert slowest_tenant_s_per_token(problem, structure) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_other_structure_is_done_sooner(ranks):
    problem = make_problem(MIXED_STEPS[:4], ranks=ranks)
    chosen: list[float] = []

    def watched(problem, structure):
        chosen.append(makespan_s(problem, structure))
        return chosen[-1]

    plan_problem(problem, options=PlanOptions(objective=watched))
    least = min(makespan_s(problem, structure) for structure in every_structure(problem))
    assert min(chosen) <= 1.01 * least
    assert (
        search_problem(problem, options=PlanOptions(objective="makespan")).decisions.objective == "makespan"
    )


def test_the_makespan_is_the_sum_of_the_phases():
    problem = make_problem(MIXED_STEPS[:2], ranks=1)
    options = replace(FREE, template="flush")
    both = find_objective("iteration").score(problem, structures_of(problem, options)[0])
    small = make_problem(MIXED_STEPS[1:2], ranks=1)
    alone = find_objective("iteration").score(small, structures_of(small, options)[0])
    found = makespan_s(problem, structures_of(problem, options)[0])
    assert found == pytest.approx(2 * both + 38 * alone, rel=0.02)


def test_a_function_with_the_name_of_an_objective_is_refused():
    def iteration(problem, structure):
        return structure.pp

    with pytest.raises(SpecError, match="a function of another name: iteration is one of ours"):
        plan_problem(make_problem(), options=PlanOptions(objective=iteration))


def test_a_function_of_a_file_decides(tmp_path):
    (tmp_path / "mine.py").write_text("def stages(problem, structure):\n    return structure.pp\n")
    named = f"{tmp_path / 'mine.py'}:stages"
    plan = search_problem(gpu_problem(count=2), options=PlanOptions(objective=named, tp=1, dp=1))
    assert (plan.parallelism.pp, plan.decisions.objective) == (1, "stages")
    with pytest.raises(SpecError, match=r"--objective .*mine\.py = 'stage': expected one of stages"):
        find_objective(f"{tmp_path / 'mine.py'}:stage")


def fewest_stages(problem, structure):
    return structure.pp


@pytest.mark.parametrize("policy", ["muxtune", "temporal-only", "nemo"])
def test_a_function_of_ones_own_decides(policy):
    problem = gpu_problem(count=2)
    options = PlanOptions(objective=fewest_stages, tp=1, dp=1)
    plan = search_problem(problem, policy=policy, options=options)
    assert plan.parallelism.pp == 1
    assert plan.decisions.objective == "fewest_stages"
    more = PlanOptions(objective=lambda problem, structure: -structure.pp, tp=1, dp=1)
    assert search_problem(problem, policy=policy, options=more).parallelism.pp == 4


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (
            "speed",
            SpecError,
            "'speed': expected iteration, memory, makespan, slowest-tenant, FILE",
        ),
        (lambda problem, structure: float("nan"), PluginError, "it returned nan: expected a finite number"),
        (lambda problem, structure: structure.nothing, PluginError, "'<lambda>': it raised AttributeError"),
        (lambda problem, structure: None, PluginError, "it raised TypeError"),
    ],
)
def test_what_is_no_objective_is_refused_in_a_line(objective, error, message):
    with pytest.raises(error, match=message) as caught:
        plan_problem(make_problem(), options=PlanOptions(objective=objective))
    assert "\n" not in str(caught.value)


def test_exhaustive_and_explanations_are_of_time():
    with pytest.raises(SpecError, match="--objective = 'memory': expected iteration"):
        plan_problem(make_problem(), policy="exhaustive", options=MEMORY)


def test_the_command_takes_it_and_the_plan_keeps_it(tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["--workload", ROOT / "examples" / "eight-tenants.yaml", "--cluster", "testbed-a"]
    command = ["plan", *arguments, "--policy", "sl-peft", "--objective", "memory", "--out", out]
    done = CliRunner().invoke(app, [str(each) for each in command])
    assert done.exit_code == 0, done.output
    plan = load_plan(out)
    assert plan.decisions.objective == "memory"
    ((_, pp),) = {(plan.parallelism.tp, plan.parallelism.pp)}
    assert plan.parallelism.ranks == 4
    assert pp >= 1


def test_the_same_workload_is_planned_for_another_objective_without_the_first():
    problem = gpu_problem(count=2)
    again = PlanningProblem(
        Workload(tasks=tuple(problem.tasks)), problem.model, problem.cluster, problem.costs
    )
    search_problem(problem, options=FREE)
    assert search_problem(problem, options=MEMORY) == search_problem(again, options=MEMORY)
