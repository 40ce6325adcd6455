"""Overlap inside of stages: where it is tried, with which contention, and how it is forced."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from muxtune.cluster import load_cluster
from muxtune.orchestration import MODES, clock_segments
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS, SearchSettings
from muxtune.planning.problem.assemble import assemble_plan, structure_iteration_s
from muxtune.planning.problem.schedules import modes_to_try
from muxtune.planning.search.search import search_structures
from muxtune.policies import POLICIES
from tests.muxtune.planning.estimate.test_group_seconds import gpu_problem
from tests.muxtune.planning.problems import FakeCosts, make_problem

TP = PlanOptions(tp=2)


class Contended(FakeCosts):
    """A device on which somebody has measured it, with collectives worth hiding."""

    def __init__(self, contention: float) -> None:
        super().__init__()
        self._contention = contention

    @property
    def contention(self) -> float:
        return self._contention

    def latency_s(self, op, phase):
        return 3e-4 if op.kind == "all_reduce" else super().latency_s(op, phase)


@dataclass
class Asked:
    """What is read of a problem."""

    kind: str
    contention: float | None
    settings: SearchSettings = DEFAULT_SETTINGS

    @property
    def cluster(self):
        cluster = load_cluster("testbed-a")
        return cluster.model_copy(update={"device": cluster.device.model_copy(update={"kind": self.kind})})

    @property
    def costs(self):
        return self


@pytest.mark.parametrize(
    ("kind", "contention", "tried"),
    [
        ("cpu", None, False),
        ("cpu", 0.3, True),
        ("cpu", 1.0, False),
        ("cuda", None, True),
        ("cuda", 0.1, True),
    ],
)
def test_a_cpu_overlaps_where_its_contention_is_known(kind, contention, tried):
    assert bool(modes_to_try(Asked(kind, contention), PlanOptions())) == tried
    assert modes_to_try(Asked(kind, contention), PlanOptions(without=("orchestration",))) == ()


@pytest.mark.parametrize("mode", MODES)
def test_a_forced_mode_is_the_only_one(mode):
    expected = () if mode == "sequential" else (mode,)
    assert modes_to_try(Asked("cpu", None), PlanOptions(orchestration=mode)) == expected


def test_the_search_hides_communication_as_far_as_contention_allows():
    """Little contention: interleaved. From 1 on nothing is gained, and the plain order is kept."""
    best = {k: search_structures(make_problem(costs=Contended(k)), TP).structures[0] for k in (0.1, 1.2)}
    assert best[0.1].orchestration.mode != "sequential"
    assert best[0.1].orchestration.contention == 0.1
    assert best[1.2].orchestration.mode == "sequential"


def test_gpus_without_a_measurement_have_no_contention():
    problem = gpu_problem(4, cluster="testbed-c")
    found = search_structures(problem, PlanOptions(tp=8, orchestration="interleaved")).structures
    assert {structure.orchestration.contention for structure in found} == {0.0}


@pytest.mark.parametrize("partition", [None, "t0+t1,t2,t3+t4"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_can_be_forced(mode, partition):
    problem = make_problem(costs=Contended(0.4))
    options = PlanOptions(tp=2, orchestration=mode, partition=partition)
    found = POLICIES.get("muxtune").propose(problem, options)
    assert {structure.orchestration.mode for structure in found} == {mode}
    if found[0].orchestration.shares_clocks:
        assert max(map(len, found[0].buckets)) > 1 or len(found[0].htasks) == 1
    plan = assemble_plan(problem, found[0], "muxtune")
    contention = 0.0 if mode == "sequential" else 0.4
    assert plan.orchestration.contention == contention
    assert bool(plan.orchestration.launches) == (mode != "sequential")
    seconds = structure_iteration_s(problem, found[0])
    assert plan.predicted.iteration_s == pytest.approx(seconds, rel=1e-9)


def test_a_mode_that_contention_makes_useless_runs_one_launch_at_a_time():
    problem = make_problem(costs=Contended(1.2))
    found = POLICIES.get("muxtune").propose(problem, PlanOptions(tp=2, orchestration="interleaved"))[0]
    plan = assemble_plan(problem, found, "muxtune")
    assert {o.barrier for clock in plan.orchestration.launches for o in clock.orders} == {"launch"}
    assert {clock_segments(plan, 0, "fwd", htasks) for _, htasks in plan.clock_kinds} == {None}
