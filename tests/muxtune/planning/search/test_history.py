"""The same problem gets the same plan, whatever was planned before, in any order and in any process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.peft.lora import LoraSpec
from muxtune.placement import Placement
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.estimate.part_seconds import StagePrices, adapted_ops
from muxtune.planning.oracle.exhaustive import best_of_all, task_appraiser
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.refinement.local_search import refined_partitions
from muxtune.policies import plan_problem
from muxtune.tasks import Workload
from tests.muxtune.planning.problems import make_problem

MODEL = load_model_spec("llama2-7b")
SWEEP = [
    ("testbed-a", 0, 2, "muxtune"),
    ("testbed-a", 1, 4, "muxtune"),
    ("testbed-a", 5, 13, "muxtune"),
    ("testbed-a", 1, 5, "lorafusion"),
    ("testbed-c", 2, 3, "muxtune"),
    ("testbed-c", 2, 4, "hf-peft"),
]
"""Cluster, seed, tasks and policy; problems of one size and of several share what is kept."""


def make_costs(cluster_name: str) -> AnalyticCosts:
    cluster = load_cluster(cluster_name)
    return AnalyticCosts(cluster.device.name, MODEL, interconnect_of(cluster))


def small_steps(workload: Workload) -> Workload:
    """One sequence per step: the fewest targets that a micro-batch can have."""
    size = {"global_batch_size": 1, "micro_batch_size": 1}
    return workload.model_copy(
        update={"tasks": tuple(task.model_copy(update=size) for task in workload.tasks)}
    )


def digest(point: tuple[str, int, int, str], costs: CostModel) -> str:
    """Of all finalists, to the last bit."""
    cluster, seed, tasks, policy = point
    problem = PlanningProblem(random_workload(seed, tasks=tasks), MODEL, load_cluster(cluster), costs)
    plans = plan_problem(problem, policy=policy)
    return hashlib.sha256("".join(plan.model_dump_json() for plan in plans).encode()).hexdigest()


@cache
def fresh_digests() -> list[str]:
    """Each point with costs of its own."""
    return [digest(point, make_costs(point[0])) for point in SWEEP]


@pytest.mark.slow
def test_a_shuffled_sweep_finds_the_same_plans():
    expected = dict(zip(SWEEP, fresh_digests(), strict=True))
    for seed in range(2):
        costs = {cluster: make_costs(cluster) for cluster in ("testbed-a", "testbed-c")}
        for cluster, each in costs.items():  # what is kept is asked for by a small problem first
            small = small_steps(random_workload(seed, tasks=2))
            plan_problem(PlanningProblem(small, MODEL, load_cluster(cluster), each))
        for point in random.Random(seed).sample(SWEEP, len(SWEEP)):
            assert digest(point, costs[point[0]]) == expected[point], point


@pytest.mark.slow
def test_other_processes_find_the_same_plans():
    program = "from tests.muxtune.planning.search.test_history import *; print(*fresh_digests(), sep='\\n')"
    said = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    assert said == [fresh_digests()] * 2  # here, after whatever other tests have planned


def test_policies_leave_nothing_in_a_problem_that_they_share():
    def dump(problem: PlanningProblem, policy: str) -> str:
        return "".join(plan.model_dump_json() for plan in plan_problem(problem, policy=policy))

    names = ["muxtune", "exhaustive", "spatial-only", "mlora", "nemo"]
    alone = {name: dump(make_problem(), name) for name in names}
    for order in (names, names[::-1]):
        shared = make_problem()
        for name in order:
            assert dump(shared, name) == alone[name], (name, order)


PARTS = (
    "layer_s",
    "links_s",
    "last_s",
    "message_s",
    "attention_s",
    "feed_s",
    "p2p_s",
    "first_s",
    "adapter_s",
)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_prices_do_not_depend_on_what_was_asked_before(seed, tp):
    draw = np.random.default_rng(seed)
    largest = 4**8
    sizes = {part: np.unique(draw.integers(1, largest, 40).astype(np.int64)) for part in PARTS}
    lora = LoraSpec(method="lora", r=8, alpha=16, targets=("q_proj", "v_proj"))

    def ask(prices: StagePrices, part: str, sizes: np.ndarray) -> np.ndarray:
        if part == "layer_s":
            return prices.layer_s(sizes)
        floats = sizes.astype(np.float64)
        if part == "attention_s":
            return np.concatenate([prices.attention_s(floats / slots, slots) for slots in (64, 512)])
        if part == "first_s":
            return prices.first_s(floats, 1)
        if part == "adapter_s":
            ops = adapted_ops(MODEL, prices.shard, (lora,))[0]
            return prices.adapter_s(ops, floats, np.full(len(floats), 8.0))
        if part == "p2p_s":
            return prices.p2p_s(floats, Placement(tp, 2, 2, 4).message_routes())
        return getattr(prices, part)(floats)

    used = StagePrices(make_costs("testbed-a"), MODEL, tp, largest, DEFAULT_SETTINGS.curve_points)
    for part in draw.permutation(PARTS):
        ask(used, part, np.array([1, 2, 3]))  # somebody's small problem
        ask(used.between([lora] * 9, [100] * 9), part, draw.integers(1, largest, 7))
    for part in draw.permutation(PARTS):
        fresh = StagePrices(make_costs("testbed-a"), MODEL, tp, largest, DEFAULT_SETTINGS.curve_points)
        assert np.array_equal(ask(used, part, sizes[part]), ask(fresh, part, sizes[part])), part
        again = draw.permutation(sizes[part])
        expected = ask(fresh, part, sizes[part])
        if part not in {"attention_s"}:  # whose answers are for two lengths, one after the other
            expected = expected[np.searchsorted(sizes[part], again)]
            assert np.array_equal(ask(used, part, again), expected), part


def test_where_shared_launches_lie_is_nobody_elses_business():
    prices = StagePrices(make_costs("testbed-a"), MODEL, 1, 4**8, DEFAULT_SETTINGS.curve_points)
    wide = LoraSpec(method="lora", r=64, alpha=16, targets=("q_proj", "v_proj"))
    narrow = LoraSpec(method="lora", r=1, alpha=16, targets=("q_proj", "v_proj"))
    first = prices.between([wide] * 4, [4000] * 4)
    before = [values.copy() for values in first._apart]
    second = prices.between([narrow] * 16, [16] * 16)
    assert all(np.array_equal(*pair) for pair in zip(first._apart, before, strict=True))
    assert len(second._apart[0]) != len(first._apart[0])


@pytest.mark.parametrize("options", [FREE, PlanOptions(carry=1)], ids=["cut", "whole"])
def test_a_refinement_does_not_depend_on_what_its_table_knows(options):
    problem = make_problem()
    expected = refined_partitions(task_appraiser(problem, options))
    used = task_appraiser(problem, options)
    best_of_all(used)  # prices all groups
    assert refined_partitions(used) == expected
    assert refined_partitions(used) == expected
