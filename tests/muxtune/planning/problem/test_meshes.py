"""Meshes: all that can be, none that cannot."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from muxtune.cluster import load_cluster
from muxtune.model import PRESETS
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.schedules import aligned_groups, in_order
from muxtune.policies import plan_problem
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import FakeCosts, make_problem

LLAMA = PRESETS["llama2-7b"]  # 32 heads, 32 layers


def meshes(cluster: str, options: PlanOptions = FREE, **arguments: bool) -> set[tuple[int, int, int]]:
    return {tuple(mesh) for mesh in candidate_meshes(LLAMA, load_cluster(cluster), options, **arguments)}


@pytest.mark.parametrize(
    ("cluster", "ranks", "per_node"), [("testbed-a", 4, 4), ("testbed-b", 16, 2), ("testbed-c", 8, 8)]
)
def test_all_splits_of_all_ranks_with_tensor_parallel_ranks_inside_a_node(cluster, ranks, per_node):
    expected = {
        (tp, pp, dp)
        for tp, pp, dp in product(range(1, ranks + 1), repeat=3)
        if tp * pp * dp == ranks and per_node % tp == 0
    }
    assert meshes(cluster) == expected
    with_idle = meshes(cluster, idle=True)
    assert expected < with_idle
    assert (1, 1, 1) in with_idle
    assert all(tp * pp * dp <= ranks and per_node % tp == 0 for tp, pp, dp in with_idle)


def test_most_ranks_come_first():
    ranks = [m.ranks for m in candidate_meshes(LLAMA, load_cluster("testbed-c"), FREE, idle=True)]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_with_idle_ranks_more_devices_of_a_node_allow_all_that_fewer_do(ranks):
    def node(count: int) -> set[tuple[int, int, int]]:
        cluster = load_cluster("testbed-c").model_copy(update={"ranks": count})
        return {tuple(mesh) for mesh in candidate_meshes(LLAMA, cluster, FREE, idle=True)}

    assert node(ranks) < node(ranks + 1)
    assert ranks < 3 or (2, 1, 1) in node(ranks)


def test_on_several_nodes_no_ranks_of_a_stage_lie_on_two():
    cluster = load_cluster("testbed-b").model_copy(update={"ranks": 12, "nodes": 4})  # of three
    for mesh in candidate_meshes(LLAMA, cluster, FREE, idle=True):
        for first in range(0, mesh.ranks, mesh.tp):  # ranks of a stage are neighbours
            assert len({rank // 3 for rank in range(first, first + mesh.tp)}) == 1, mesh


def test_heads_are_not_cut_and_no_stage_is_empty():
    narrow = LLAMA.model_copy(update={"heads": 6, "kv_heads": 6, "hidden": 768, "layers": 2})
    found = candidate_meshes(narrow, load_cluster("testbed-c"), FREE)
    assert {m.tp for m in found} == {1, 2}  # 4 and 8 do not divide 6 heads
    assert max(m.pp for m in found) == 2


def test_ranks_stay_idle_where_nothing_uses_all():
    short = LLAMA.model_copy(update={"layers": 4})
    assert candidate_meshes(short, load_cluster("cpu-6"), FREE) == [MeshShape(1, 4, 1)]


@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 2e-3])
@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_ranks_stay_idle_where_that_is_faster(launch_s, template):
    problem = make_problem(ranks=4, costs=FakeCosts(launch_s=launch_s))

    def build(fixed):
        htasks, mesh = aligned_groups(problem, fixed, [(task_id,) for task_id in problem.data])
        return [in_order(htasks, mesh, template)]

    def fastest_s(structures):
        return min(structure_iteration_s(problem, structure) for structure in structures)

    everywhere = [
        structure
        for shape in candidate_meshes(problem.model, problem.cluster, FREE, idle=True)
        for structure in build(replace(FREE, **shape._asdict()))
    ]
    assert fastest_s(on_every_mesh(problem, FREE, build)) == fastest_s(everywhere)


def test_only_pipelines_on_cpus_unless_something_else_is_asked_for():
    assert meshes("cpu-4") == {(1, 4, 1)}
    assert meshes("cpu-4", PlanOptions(pp=2)) == {(1, 2, 1)}
    assert meshes("cpu-4", PlanOptions(dp=2)) == {(1, 2, 2)}
    assert meshes("cpu-4", PlanOptions(tp=2, dp=2)) == {(2, 1, 2)}


def test_what_is_fixed_stays_fixed():
    assert meshes("testbed-c", PlanOptions(tp=2)) == {(2, 1, 4), (2, 2, 2), (2, 4, 1)}
    assert meshes("testbed-c", PlanOptions(pp=3)) == {(1, 3, 2), (2, 3, 1)}
    assert meshes("testbed-c", PlanOptions(tp=2, pp=2, dp=1)) == {(2, 2, 1)}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (PlanOptions(tp=3), "--tp 3"),
        (PlanOptions(tp=4, pp=4), "--tp 4, --pp 4"),
        (PlanOptions(pp=33), "--pp 33"),
    ],
)
def test_an_impossible_mesh_is_refused_with_what_would_be_possible(options, asked):
    with pytest.raises(SpecError, match=f"mesh = '{asked}': expected at most 8 ranks in all, tp a divisor"):
        meshes("testbed-c", options)


def test_a_builder_is_asked_for_every_mesh_and_keeps_what_fits():
    problem = make_problem(({},) * 3, ranks=4)
    asked = []

    def build(fixed):
        asked.append((fixed.tp, fixed.pp, fixed.dp))
        htasks, mesh = aligned_groups(problem, fixed, [tuple(problem.data)])
        return [in_order(htasks, mesh, "flush")]

    found = on_every_mesh(problem, PlanOptions(tp=1, dp=None), build)
    assert asked[0] == (1, 4, 1)
    assert set(asked) <= {(1, pp, 1) for pp in (1, 2, 3, 4)}  # a CPU cluster
    assert [structure.mesh.pp for structure in found] == [pp for _, pp, _ in asked]
    small = make_problem(({},) * 3, ranks=4, memory_bytes=1_000_000)
    with pytest.raises(SpecError, match="memory_bytes of fake"):
        on_every_mesh(small, FREE, build)


def test_key_and_value_heads_are_dealt_out_as_the_runtime_can():
    """Six heads of queries on three of keys and values: two ranks would need half a head."""
    model = PRESETS["llama-tiny"].model_copy(update={"heads": 6, "kv_heads": 3, "head_dim": 16})
    cluster = load_cluster("a100-8")
    tps = {shape.tp for shape in candidate_meshes(model, cluster, PlanOptions(), idle=True)}
    assert tps == {1, 3, 6}  # 3 and 6 divide no node of 8, and fit into one
    with pytest.raises(SpecError, match=r"mesh = '--tp 2'.* multiple of 3 key and value heads"):
        candidate_meshes(model, cluster, PlanOptions(tp=2))


def test_named_meshes_stand_in_for_all_others():
    problem = make_problem(ranks=4)
    model, cluster = problem.model, problem.cluster
    possible = candidate_meshes(model, cluster, PlanOptions(), idle=True)
    assert (2, 1, 2) not in possible  # only pipelines on CPUs
    named = ((2, 1, 2), (1, 2, 1), (1, 2, 1))
    found = candidate_meshes(model, cluster, PlanOptions(meshes=named), idle=True)
    assert found == [(2, 1, 2), (1, 2, 1)]
    assert candidate_meshes(model, cluster, PlanOptions(meshes=named)) == [(2, 1, 2)]
    assert candidate_meshes(model, cluster, PlanOptions(meshes=named, pp=2), idle=True) == [(1, 2, 1)]
    for policy in ("muxtune", "nemo", "exhaustive"):
        plan = plan_problem(problem, policy=policy, options=PlanOptions(meshes=((2, 1, 2),)))[0]
        assert (plan.parallelism.tp, plan.parallelism.pp, plan.parallelism.dp) == (2, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(meshes=((1, 2, 1), (3, 1, 1))), "mesh = 'tp 3, pp 1, dp 1': expected at most 4 ranks"),
        (PlanOptions(meshes=((1, 8, 1),)), "mesh = 'tp 1, pp 8, dp 1': expected"),
        (PlanOptions(meshes=((1, 0, 1),)), "mesh = 'tp 1, pp 0, dp 1': expected"),
        (PlanOptions(meshes=()), "mesh = 'one of 0 meshes': expected"),
        (PlanOptions(meshes=((1, 2, 1),), tp=2), "mesh = '--tp 2 of 1 meshes': expected"),
    ],
)
def test_a_named_mesh_that_cannot_be_is_refused(options, message):
    problem = make_problem(ranks=4)
    with pytest.raises(SpecError, match=message):
        candidate_meshes(problem.model, problem.cluster, options)
