"""The search: pruned against unpruned, options, memory, and what it reports."""

from __future__ import annotations

from contextlib import suppress

import pytest

from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.problem.meshes import candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.search import search_structures
from muxtune.policies import POLICIES, plan_problem
from muxtune.support.errors import SpecError
from tests.muxtune.planning.estimate.test_group_seconds import gpu_problem
from tests.muxtune.planning.problems import FakeCosts, make_problem, make_workload
from tests.sampling import in_full


@pytest.mark.parametrize(
    ("cluster", "seed"), [("testbed-a", 0), ("testbed-a", 1), *in_full(("testbed-c", 2))]
)
def test_pruned_search_finds_what_the_unpruned_one_finds(cluster, seed):
    problem = gpu_problem(13, seed=seed, cluster=cluster)  # too many for refinement, few enough for all
    pruned = search_structures(problem, patience=10_000)
    unpruned = search_structures(problem, prune=False)
    assert len(unpruned.outcomes) == len(unpruned.proposals)
    assert pruned.pruned > len(pruned.proposals) // 2
    best_s, same_s = (structure_iteration_s(problem, r.structures[0]) for r in (pruned, unpruned))
    assert best_s == pytest.approx(same_s, rel=1e-12)


@pytest.mark.parametrize("seed", [3, 7, 8])
def test_few_tasks_are_searched_as_well_as_exhaustively_on_all_meshes(seed):
    problem = gpu_problem(5, seed=100 + seed, cluster="testbed-c")
    best = POLICIES.get("exhaustive").propose(problem, PlanOptions())[0]
    found_s = search_structures(problem).outcomes[0].value
    assert found_s <= 1.01 * structure_iteration_s(problem, best)


@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 2e-3])
def test_structures_come_fastest_first_with_their_own_seconds(launch_s):
    problem = make_problem(costs=FakeCosts(launch_s=launch_s))
    record = search_structures(problem, PlanOptions(pp=2))
    seconds = [structure_iteration_s(problem, structure) for structure in record.structures]
    assert seconds == sorted(seconds)
    assert seconds[0] == pytest.approx(record.outcomes[0].value)
    for structure in record.structures:
        ids = [task_id for htask in structure.htasks for task_id in htask.task_ids]
        assert sorted(ids) == sorted(problem.data)
        assert structure.mesh.pp == 2


def test_many_tasks_are_searched_with_patience():
    problem = gpu_problem(2 * DEFAULT_SETTINGS.refined_below, cluster="testbed-c")
    thorough = search_structures(problem, patience=1000)
    patient = search_structures(problem)
    assert len(patient.outcomes) <= len(thorough.outcomes)
    assert patient.outcomes[0].value <= 1.01 * thorough.outcomes[0].value


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(pp=4, tp=1, dp=2),
        PlanOptions(tp=2),
        PlanOptions(alignment="pad"),
        PlanOptions(alignment="chunk"),
        PlanOptions(chunk_tokens=512),
        PlanOptions(template="flush"),
    ],
    ids=str,
)
def test_what_is_fixed_stays_fixed(options):
    record = search_structures(gpu_problem(6, cluster="testbed-c"), options)
    for structure in record.structures:
        mesh = structure.mesh
        for wanted, is_ in ((options.tp, mesh.tp), (options.pp, mesh.pp), (options.dp, mesh.dp)):
            assert wanted in {None, is_}
        assert options.template in {None, structure.template}
        for htask in structure.htasks:
            wanted_alignment = "chunk" if options.chunk_tokens else options.alignment
            assert wanted_alignment in {None, htask.shape.alignment}
            assert options.chunk_tokens in {None, htask.shape.row_tokens}


def test_contradicting_options_are_refused():
    problem = make_problem()
    with pytest.raises(SpecError, match="--chunk-tokens"):
        search_structures(problem, PlanOptions(alignment="pad", chunk_tokens=64))


def test_what_the_search_keeps_fits_the_memory():
    roomy = search_structures(make_problem()).structures[0]
    problem = make_problem()
    needed = max(stage.total_bytes for stage in problem.memory(roomy))
    held = max(s.backbone_bytes + s.adapter_bytes + s.optimizer_bytes for s in problem.memory(roomy))
    for share in (0.9, 0.7):
        small = make_problem(memory_bytes=int(held + share * (needed - held)))
        found = search_structures(small).structures
        assert found
        assert found[0] != roomy
        assert all(fits(small, structure) for structure in found)


def test_nothing_that_fits_is_refused_with_what_is_needed():
    with pytest.raises(SpecError, match=r"memory_bytes.*at least \d+"):
        search_structures(make_problem(memory_bytes=10**6))


def test_progress_goes_on_to_its_end():
    told: list[tuple[int, int]] = []
    search_structures(make_problem(), progress=lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1]
    assert all(done <= of for done, of in told)


def test_search_of_64_tasks_looks_at_few_of_its_partitions():
    """What the speed rests on; ``python -m benchmarks.planning`` measures the speed."""
    spec = load_cluster("testbed-b")
    problem = gpu_problem(64)
    assert problem.cluster == spec
    assert len(random_workload(1, tasks=64).tasks) == 64
    record = search_structures(problem)
    assert len(record.proposals) > 500
    assert len(record.outcomes) < 60
    best = record.outcomes[0]
    assert best.value < 1.06 * best.bound_s


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refusal_names_the_bytes_of_the_partition_that_needs_least(ranks):
    said = []
    for policy in ("muxtune", "exhaustive"):
        with pytest.raises(SpecError, match="expected at least") as refused:
            plan_problem(make_problem(ranks=ranks, memory_bytes=1_000_000), policy=policy)
        said.append(str(refused.value))
    assert said[0] == said[1]


TWO_LENGTHS = make_workload(
    [
        {
            "id": name,
            "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "dataset": {"lengths": name},
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "max_length": max_length,
            "learning_rate": 1e-3,
            "steps": 2,
        }
        for name, max_length in (("sst2", 64), ("rte", 256))
    ]
)


@pytest.mark.parametrize(
    ("cluster", "memory_bytes", "workload"),
    [
        ("a100-2", 10_000_000_000, TWO_LENGTHS),  # one mesh surely has room, a faster one just so
        ("testbed-a", 7_428_571_428, random_workload(2, tasks=4)),  # the fastest has room for cut ones alone
    ],
    ids=["just-so", "cut"],
)
def test_near_the_memory_s_limit_a_free_choice_is_no_worse_than_any_fixed_mesh(
    cluster, memory_bytes, workload
):
    spec, model = load_cluster(cluster), load_model_spec("llama2-7b")
    device = spec.device.model_copy(update={"memory_bytes": memory_bytes})
    spec = spec.model_copy(update={"device": device})
    costs = AnalyticCosts(device.name, model, interconnect_of(spec))
    problem = PlanningProblem(workload, model, spec, costs)
    fixed_s = []
    for shape in candidate_meshes(model, spec, FREE):
        with suppress(SpecError):
            fixed_s.append(search_structures(problem, PlanOptions(**shape._asdict())).outcomes[0].value)
    assert len(fixed_s) > 1
    assert search_structures(problem).outcomes[0].value <= 1.01 * min(fixed_s)
