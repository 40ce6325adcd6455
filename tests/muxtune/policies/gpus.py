"""Planning problems on the paper's testbeds, priced by shipped coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from muxtune.cluster import GPUS, ClusterSpec, load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.problem.problem import PlanningProblem
from tests.muxtune.planning.problems import MIXED, make_workload


@cache
def gpu_problem(
    cluster_name: str = "testbed-a", model_name: str = "llama2-7b", count: int = len(MIXED)
) -> PlanningProblem:
    """``count`` mixed tasks; the same problem for the same arguments, since prices are kept in it."""
    model, cluster = load_model_spec(model_name, "bfloat16"), load_cluster(cluster_name)
    peft = {"method": "lora", "r": 8, "alpha": 16, "targets": ["all-linear"]}  # every family has these
    tasks: Sequence[dict[str, object]] = [MIXED[i % len(MIXED)] | {"peft": peft} for i in range(count)]
    costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    return PlanningProblem(make_workload(tasks), model, cluster, costs)


def node_of(ranks: int) -> ClusterSpec:
    """A100s that all reach each other."""
    return ClusterSpec(name=f"node-{ranks}", device=GPUS["a100"], ranks=ranks, within_node="nvlink-all")


def nodes_of_two(ranks: int) -> ClusterSpec:
    """As testbed-b has them."""
    return ClusterSpec(
        name=f"pairs-{ranks}",
        device=GPUS["a40"],
        ranks=ranks,
        nodes=ranks // 2,
        within_node="nvlink-pair",
        between_nodes="infiniband",
    )
