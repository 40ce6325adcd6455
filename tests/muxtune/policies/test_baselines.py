"""``muxtune`` is never slower than a policy that decides less: whatever they plan, it could have planned.

``nemo`` and ``hf-peft`` have copies of the backbone, and ``mlora`` a template of its own; those are no plans
of ``muxtune``, and no faster.
"""

from __future__ import annotations

from functools import cache
from random import Random

import pytest

from experiments.workloads import random_workload
from muxtune.cluster import GPUS, ClusterSpec
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.options import FREE
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import POLICIES
from muxtune.policies.finalists import fastest
from muxtune.support.errors import SpecError
from tests.muxtune.policies.gpus import node_of, nodes_of_two
from tests.sampling import sampled

MODEL = load_model_spec("llama2-7b")
BASELINES = ("lorafusion", "mlora", "spatial-only", "temporal-only", "sl-peft", "nemo", "hf-peft")
ROUNDING = 1e-9

Case = tuple[ClusterSpec, int, int]
"""Cluster, number of tasks and seed of the workload."""


def single_gpus(ranks: int) -> ClusterSpec:
    """Nodes with an A100 each."""
    return ClusterSpec(
        name=f"single-{ranks}",
        device=GPUS["a100"],
        ranks=ranks,
        nodes=ranks,
        within_node="nvlink-all",
        between_nodes="infiniband",
    )


def drawn_case(seed: int) -> Case:
    random = Random(seed)
    kind = (single_gpus, node_of, nodes_of_two)[seed % 3]
    ranks = random.choice((4, 6, 8)) if kind is nodes_of_two else random.randint(2, 8)
    return kind(ranks), random.randint(1, 5), seed


@cache
def problem_of(case: Case) -> PlanningProblem:
    cluster, tasks, seed = case
    costs = AnalyticCosts(cluster.device.name, MODEL, interconnect_of(cluster))
    return PlanningProblem(random_workload(seed, tasks=tasks), MODEL, cluster, costs)


@cache
def iteration_s(case: Case, policy: str) -> float:
    """Best iteration of a policy; infinite where nothing fits."""
    problem = problem_of(case)
    try:
        structures = POLICIES.get(policy).propose(problem, FREE)
    except SpecError:
        return float("inf")
    return structure_iteration_s(problem, fastest(problem, structures, 1)[0])


def assert_no_slower(case: Case) -> None:
    own_s = iteration_s(case, "muxtune")
    ratios = {name: own_s / iteration_s(case, name) for name in BASELINES}
    slower = {name: ratio for name, ratio in ratios.items() if ratio > 1 + ROUNDING}
    assert not slower, (case, slower)


SLOWER = {
    9: "0.2 %: a partition that the search passes over",
    19: "0.7 %: chunks hold fewer tokens than packed sequences, which no estimate knows",
    27: "2 %: a partition that is far from the best before it is spread",
    35: "0.5 %: a mesh whose guesses are too slow without the best order of injection",
    40: "0.1 %: another order of the tasks of an hTask",
    45: "3 %: a partition that bounds rule out before it is spread",
}
"""Cases in which a baseline is still faster."""


def cases() -> list[object]:
    return [
        pytest.param(seed, marks=pytest.mark.xfail(reason=SLOWER[seed], strict=True))
        if seed in SLOWER
        else seed
        for seed in sampled(range(48), every=6)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", cases())
def test_muxtune_is_no_slower_than_any_baseline(seed: int) -> None:
    assert_no_slower(drawn_case(seed))


@pytest.mark.parametrize(
    ("ranks", "tasks", "seed"),
    [
        pytest.param(7, 3, 11, id="10 micro-batches instead of 4"),
        pytest.param(12, 5, 8, id="spread, where cutting seemed to be enough", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_are_spread_where_stages_wait(ranks: int, tasks: int, seed: int) -> None:
    case = single_gpus(ranks), tasks, seed
    assert iteration_s(case, "muxtune") <= iteration_s(case, "lorafusion") * (1 + ROUNDING)


def test_another_order_of_the_tasks_of_an_htask_is_looked_at() -> None:
    case = nodes_of_two(4), 4, 6
    assert iteration_s(case, "muxtune") <= iteration_s(case, "spatial-only") * (1 + ROUNDING)
