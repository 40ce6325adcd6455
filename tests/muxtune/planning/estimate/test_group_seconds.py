"""Estimated prices against exact ones, on the cost models of GPUs."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.decisions.structure import SEQUENTIAL, HTaskChoice, Mesh
from muxtune.planning.estimate.curves import round_tokens, sample_curve
from muxtune.planning.estimate.group_seconds import GroupBands, price_groups
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.exact.bounds import exact_bounds
from muxtune.planning.problem.layouts import sort_by_tokens
from muxtune.planning.problem.meshes import MeshShape, balanced_layers
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.proposals import propose_on_mesh, stage_work_s


def gpu_problem(tasks: int, seed: int = 1, cluster: str = "testbed-b") -> PlanningProblem:
    spec = load_cluster(cluster)
    model = load_model_spec("llama2-7b")
    costs = AnalyticCosts(spec.device.name, model, interconnect_of(spec))
    return PlanningProblem(random_workload(seed, tasks=tasks), model, spec, costs)


def ranked(problem: PlanningProblem, tp: int) -> tuple[GroupBands, StagePrices]:
    order = sort_by_tokens(problem)
    bands = GroupBands(problem, order, len(order), [("pack", None), ("pad", None)])
    prices = StagePrices(problem.costs, problem.model, tp, bands.most_tokens, DEFAULT_SETTINGS.curve_points)
    prices = prices.between(bands.pefts, bands.typical_tokens)
    return bands, prices


@pytest.mark.parametrize(
    ("cluster", "shape"),
    [
        ("testbed-b", MeshShape(1, 4, 2)),
        ("testbed-b", MeshShape(1, 4, 4)),
        ("testbed-b", MeshShape(2, 4, 1)),
        ("testbed-c", MeshShape(4, 1, 2)),
        ("testbed-c", MeshShape(1, 2, 4)),
    ],
    ids=str,
)
def test_groups_cost_about_what_the_estimate_says(cluster, shape):
    problem = gpu_problem(24, cluster=cluster)
    tp, pp, dp = shape
    bands, prices = ranked(problem, tp)
    groups = price_groups(bands, prices, shape)
    mesh = Mesh((32 // pp,) * pp, tp, dp)
    work_s = stage_work_s(bands, groups, mesh)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        end = int(rng.integers(24))
        w = int(rng.integers(end + 1))
        task_ids = bands.task_ids[end - w : end + 1]
        shape = problem.shape(task_ids, *bands.layouts[groups.layout_nw[end, w]], dp=dp)
        assert shape.tokens == groups.tokens_nw[end, w]
        times = problem.htask_times(HTaskChoice(task_ids=task_ids, shape=shape), mesh, SEQUENTIAL)
        exact_s = np.add(times.fwd_s, times.bwd_s)
        errors.append(np.array([stage_s[end, w] for stage_s in work_s]) / exact_s - 1)
    assert abs(np.mean(errors)) < 0.02
    assert np.abs(errors).max() < 0.08  # of one task alone; groups are closer


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize(
    ("cluster", "shape"),
    [
        ("testbed-b", MeshShape(1, 16, 1)),
        ("testbed-b", MeshShape(1, 4, 4)),
        ("testbed-b", MeshShape(2, 4, 2)),
        ("testbed-c", MeshShape(1, 8, 1)),
        ("testbed-c", MeshShape(4, 1, 2)),
    ],
    ids=str,
)
def test_estimated_bounds_of_partitions_are_within_the_slack(cluster, shape, seed):
    problem = gpu_problem(24, seed, cluster)
    bands, prices = ranked(problem, shape.tp)
    found = propose_on_mesh(bands, price_groups(bands, prices, shape), shape, DEFAULT_SETTINGS.templates)
    assert len(found.proposals) > 5
    for proposal in found.proposals[::4]:
        htasks = proposal.htasks(problem)
        times = [problem.htask_times(htask, proposal.mesh, SEQUENTIAL) for htask in htasks]
        exact_s = exact_bounds(times, [htask.shape.microbatches for htask in htasks]).of(
            DEFAULT_SETTINGS.templates
        )
        assert proposal.bound_s * (1 - DEFAULT_SETTINGS.slack) < exact_s
        assert proposal.bound_s == pytest.approx(exact_s, rel=2 * DEFAULT_SETTINGS.slack)


def test_paces_find_partitions_that_a_pipeline_plays_faster():
    """Cheapest sums have micro-batches of all sizes, for which the stages wait in turn."""
    problem = gpu_problem(32)
    bands, prices = ranked(problem, 1)
    shape = MeshShape(1, 16, 1)
    found = propose_on_mesh(bands, price_groups(bands, prices, shape), shape, DEFAULT_SETTINGS.templates)
    expected = min(found.proposals, key=lambda p: p.expected_s)
    least_load = min(found.proposals, key=lambda p: p.bound_s)
    assert expected.bound_s > least_load.bound_s
    assert expected.expected_s < least_load.expected_s


def test_curves_go_through_whole_sizes_and_on_in_proportion():
    curve = sample_curve(lambda size: 2.0 + size, 100, 24)
    assert curve(np.array([0.0, 0.5, 1.0, 100.0, 200.0])).tolist() == [0.0, 1.5, 3.0, 102.0, 204.0]
    assert curve(np.array([50.0])) == pytest.approx(52.0, rel=0.01)


def test_rounded_streams_stay_on_their_side_of_a_tile():
    tokens = np.arange(1, 16000, 7)
    rounded = round_tokens(tokens)
    assert (rounded >= tokens).all()
    assert (rounded % 8 == 0).all()
    assert ((rounded - tokens) < np.maximum(8, tokens / 64)).all()
    np.testing.assert_array_equal(-(-rounded // 128), -(-tokens // 128))


@pytest.mark.parametrize(
    ("first_s", "last_s", "expected"), [(0, 0, (3, 3, 2, 2)), (0, 2.5, (3, 3, 3, 1)), (1, 0, (2, 3, 3, 2))]
)
def test_layers_go_where_they_lengthen_the_busiest_stage_least(first_s, last_s, expected):
    assert balanced_layers(10, 4, 1.0, first_s, last_s) == expected
