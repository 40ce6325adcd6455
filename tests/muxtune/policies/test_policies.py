"""Every built-in policy: what it must decide, and that its plan is valid."""

from __future__ import annotations

import pytest

from experiments.workloads import METHODS
from muxtune.plan import Plan, check_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.policies import POLICIES, plan_problem
from muxtune.policies.finalists import fastest
from muxtune.support.errors import SpecError, UserError
from tests.muxtune.planning.problems import FakeCosts, make_problem
from tests.muxtune.policies.gpus import gpu_problem

SYSTEMS = ("hf-peft", "nemo", "sl-peft", "mlora", "lorafusion", "spatial-only", "temporal-only")
OURS = (
    *("muxtune", "muxtune-no-fusion", "muxtune-no-orchestration", "muxtune-no-chunking"),
    "muxtune-one-method-per-htask",
)


def best(policy: str, options: PlanOptions | None = None, **problem: object) -> Plan:
    return plan_problem(make_problem(**problem), policy=policy, options=options or PlanOptions())[0]  # type: ignore[arg-type]


def test_the_built_in_policies_are_registered():
    assert {*SYSTEMS, *OURS} <= set(POLICIES.names())
    assert all(POLICIES.get(name).summary for name in POLICIES.names())


def test_an_unknown_policy_gets_the_nearest_name():
    with pytest.raises(UserError, match="no policy named 'slpeft'; did you mean 'sl-peft'"):
        best("slpeft")


@pytest.mark.parametrize("policy", [*SYSTEMS, *OURS])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_policy_gives_a_valid_plan_above_its_lower_bound(policy, ranks):
    plan = best(policy, PlanOptions(pp=ranks), ranks=ranks)
    check_valid(plan, policy)
    assert (plan.parallelism.tp, plan.parallelism.pp, plan.parallelism.dp) == (1, ranks, 1)  # on CPUs
    free = best(policy, ranks=ranks)
    check_valid(free, policy)
    assert free.parallelism.ranks + free.idle_ranks == ranks
    assert free.predicted.iteration_s <= plan.predicted.iteration_s * (1 + 1e-9)


@pytest.mark.parametrize("policy", [*SYSTEMS, *OURS])
def test_every_policy_plans_tasks_of_all_methods(policy):
    tasks = [{"peft": peft} for peft in METHODS]
    plan = best(policy, tasks=tasks, ranks=2)
    check_valid(plan, policy)
    assert {task.peft.method for task in plan.tasks} == {peft["method"] for peft in METHODS}


@pytest.mark.parametrize("policy", [*SYSTEMS, *OURS])
@pytest.mark.parametrize(
    ("cluster", "model", "tasks"),
    [("testbed-a", "gpt3-2.7b", 8), ("testbed-b", "opt-30b", 4), ("testbed-c", "llama2-13b", 2)],
)
def test_every_policy_plans_the_paper_s_testbeds(policy, cluster, model, tasks):
    problem = gpu_problem(cluster, model, tasks)
    plan = plan_problem(problem, policy=policy)[0]
    check_valid(plan, policy)
    assert plan.parallelism.ranks + plan.idle_ranks == problem.cluster.ranks
    assert plan.parallelism.ranks > problem.cluster.ranks // 2  # of these, fewer are never faster


def check_valid(plan: Plan, policy: str) -> None:
    check_plan(plan)
    assert plan.policy == policy
    assert plan.predicted.iteration_s >= plan.predicted.lower_bound_s * (1 - 1e-12)
    assert 0 <= plan.predicted.bubble_fraction < 1
    assert plan.predicted.effective_tokens_per_s < plan.predicted.tokens_per_s
    assert max(plan.predicted.peak_memory_bytes) <= plan.cluster.device.memory_bytes


@pytest.mark.parametrize("policy", SYSTEMS)
def test_every_system_gets_the_mesh_that_is_best_for_it(policy):
    problem = gpu_problem()
    chosen = plan_problem(problem, policy=policy)[0].predicted.iteration_s
    for mesh in ((1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2)):
        fixed = PlanOptions(**dict(zip(("tp", "pp", "dp"), mesh, strict=True)))
        try:
            other = plan_problem(problem, policy=policy, options=fixed)[0].predicted
        except SpecError:  # eight backbones do not fit every mesh
            continue
        assert chosen <= other.iteration_s * (1 + 1e-9)


@pytest.mark.parametrize("policy", ["lorafusion", "mlora", "temporal-only"])
def test_pruning_loses_none_of_the_fastest(policy):
    problem = gpu_problem()
    structures = POLICIES.get(policy).propose(problem, PlanOptions())
    every = sorted(structure_iteration_s(problem, structure) for structure in structures)
    found = [structure_iteration_s(problem, structure) for structure in fastest(problem, structures, 4)]
    assert found == every[:4]


def test_nemo_runs_every_task_as_its_own_padded_instance():
    plan = best("nemo")
    assert [h.task_ids for h in plan.htasks] == [(f"t{i}",) for i in range(5)]
    assert [h.instance for h in plan.htasks] == [0, 1, 2, 3, 4]
    assert plan.template == "flush"
    for htask in plan.htasks:
        task = plan.tasks_by_id[htask.task_ids[0]]
        assert htask.alignment == "pad"
        assert htask.microbatches == task.declared_microbatches
        assert htask.tokens_per_microbatch == task.micro_batch_size * task.max_length


def test_sl_peft_pads_everything_to_the_longest_task():
    plan = best("sl-peft")
    (htask,) = plan.htasks
    sequences = [-(-t.global_batch_size // htask.microbatches) for t in plan.tasks]
    assert htask.alignment == "pad"
    assert htask.tokens_per_microbatch == sum(sequences) * 256


def test_instances_cost_memory_and_a_shared_backbone_does_not():
    few = make_problem(({},) * 2)
    many = make_problem(({},) * 8)
    backbone = {}
    for name, problem in (("few", few), ("many", many)):
        for policy in ("nemo", "muxtune"):
            structure = POLICIES.get(policy).propose(problem, PlanOptions(pp=2))[0]
            backbone[name, policy] = [stage.backbone_bytes for stage in problem.memory(structure)]
    assert backbone["few", "muxtune"] == backbone["many", "muxtune"]
    assert backbone["many", "nemo"] == [4 * b for b in backbone["few", "nemo"]]


def test_muxtune_is_at_least_as_fast_as_every_other_policy():
    for launch_s in (1e-6, 1e-3):
        costs = FakeCosts(launch_s=launch_s)
        ours = best("muxtune", costs=costs).predicted.iteration_s
        for other in (*SYSTEMS, *OURS):
            assert ours <= best(other, costs=costs).predicted.iteration_s * (1 + 1e-9)


def test_options_are_obeyed():
    options = PlanOptions(partition="t0+t3,t1,t2+t4", alignment="pad", template="flush", pp=1)
    plan = best("muxtune", options)
    assert sorted(h.task_ids for h in plan.htasks) == [("t0", "t3"), ("t1",), ("t2", "t4")]
    assert {h.alignment for h in plan.htasks} == {"pad"}
    assert (plan.template, plan.parallelism.pp) == ("flush", 1)


@pytest.mark.parametrize("policy", SYSTEMS)
def test_policies_that_decide_the_fusion_refuse_a_partition(policy):
    with pytest.raises(SpecError, match="--partition"):
        best(policy, PlanOptions(partition="t0+t1,t2,t3,t4"))


@pytest.mark.parametrize("policy", ["muxtune", *SYSTEMS])
def test_too_little_memory_is_refused_with_the_bytes_needed(policy):
    with pytest.raises(SpecError, match=r"of fake = 976\.5 KiB: expected at least \d+\.\d MiB: stage \d"):
        best(policy, memory_bytes=1_000_000)


def test_tight_memory_makes_smaller_htasks():
    loose = best("spatial-only", PlanOptions(pp=2))
    needed = max(loose.predicted.peak_memory_bytes)
    tight = best("muxtune", PlanOptions(pp=2), memory_bytes=needed - 1)
    assert len(tight.htasks) > 1
    assert max(tight.predicted.peak_memory_bytes) < needed


@pytest.mark.parametrize("pp", [0, 3])
def test_more_stages_than_ranks_are_refused(pp):
    with pytest.raises(SpecError, match="--pp = "):
        best("muxtune", PlanOptions(pp=pp))
