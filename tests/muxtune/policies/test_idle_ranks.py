"""More devices never make a predicted plan slower: every policy may leave ranks idle."""

from __future__ import annotations

from itertools import pairwise

import pytest

from experiments.workloads import random_workload
from muxtune.api.plan_summary import plan_summary
from muxtune.cluster import ClusterSpec
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import plan_problem
from muxtune.tasks import Workload
from tests.muxtune.policies.gpus import node_of, nodes_of_two
from tests.sampling import FULL, sampled

MODEL = load_model_spec("llama2-7b")
POLICIES = (
    "muxtune",
    "nemo",
    "hf-peft",
    "sl-peft",
    "mlora",
    "lorafusion",
    "spatial-only",
    "temporal-only",
    "exhaustive",
)


def best_plan(workload: Workload, cluster: ClusterSpec, policy: str, options: PlanOptions = FREE) -> Plan:
    costs = AnalyticCosts(cluster.device.name, MODEL, interconnect_of(cluster))
    return plan_problem(PlanningProblem(workload, MODEL, cluster, costs), policy=policy, options=options)[0]


def one_long_sequence() -> Workload:
    """Nothing to share among replicas."""
    (task,) = random_workload(6, tasks=1).tasks
    changed = {"global_batch_size": 1, "micro_batch_size": 1}
    return Workload(tasks=(task.model_copy(update=changed),))


WORKLOADS = {
    "one": one_long_sequence(),
    "two": random_workload(1, tasks=2),
    "four": random_workload(3, tasks=4),
}


NODE_COUNTS = tuple(range(1, 17)) if FULL else (1, 3, 4, 5, 7, 8)
PAIR_COUNTS = tuple(range(2, 17, 2)) if FULL else (4, 6, 10)


@pytest.mark.slow
@pytest.mark.parametrize("workload", sampled(list(WORKLOADS), 2))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("cluster_of", "counts"),
    [(node_of, NODE_COUNTS), (nodes_of_two, PAIR_COUNTS)],
    ids=["node", "nodes"],
)
def test_more_devices_never_make_a_plan_slower(cluster_of, counts, policy, workload):
    if policy == "exhaustive" and workload == "four":
        counts = tuple(count for count in counts if count <= 8)
    seconds = {}
    for ranks in counts:
        plan = best_plan(WORKLOADS[workload], cluster_of(ranks), policy)
        seconds[ranks] = plan.predicted.iteration_s
        used = plan.parallelism.tp * plan.parallelism.pp * plan.parallelism.dp
        assert plan.idle_ranks == ranks - used >= 0
    for fewer, more in pairwise(counts):
        assert seconds[more] <= seconds[fewer] * (1 + 1e-9), (fewer, more, seconds)


def long_microbatches(sequences: int) -> Workload:
    """One micro-batch per step, of so many sequences, up to 256 tokens each."""
    (task,) = random_workload(6, tasks=1).tasks
    changed = {
        "dataset": task.dataset.model_copy(update={"lengths": "rte"}),
        "global_batch_size": sequences,
        "micro_batch_size": sequences,
        "max_length": 256,
    }
    return Workload(tasks=(task.model_copy(update=changed),))


@pytest.mark.parametrize("sequences", [16, 32, 64])
def test_nor_where_long_microbatches_are_cut_on_stages_that_fewer_devices_fill(sequences):
    """Of 6 devices, 3 stages of two fill all; of 7, they stand beside a faster-looking stage of four."""
    workload, alone = long_microbatches(sequences), PlanOptions(dp=1)
    seconds = [
        best_plan(workload, node_of(ranks), "muxtune", alone).predicted.iteration_s for ranks in range(5, 9)
    ]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in pairwise(seconds)), seconds


def test_what_is_fixed_stays_fixed_and_the_rest_may_be_idle():
    workload = WORKLOADS["one"]
    for policy in ("muxtune", "nemo", "spatial-only"):
        fixed = best_plan(workload, node_of(5), policy, PlanOptions(tp=1, pp=2, dp=2))
        assert (fixed.parallelism.tp, fixed.parallelism.pp, fixed.parallelism.dp) == (1, 2, 2)
        assert fixed.idle_ranks == 1
        assert best_plan(workload, node_of(5), policy, PlanOptions(dp=2)).parallelism.dp == 2


def test_a_summary_says_how_many_ranks_are_idle():
    idle = best_plan(WORKLOADS["two"], node_of(5), "nemo", PlanOptions(tp=2, pp=1, dp=2))
    assert "1 of 5 ranks idle; costs" in plan_summary(idle)
    assert "ranks idle" in plan_summary(idle).split("iteration")[-1]
    busy = best_plan(WORKLOADS["two"], node_of(4), "nemo", PlanOptions(tp=2, pp=1, dp=2))
    assert "idle" not in plan_summary(busy)
