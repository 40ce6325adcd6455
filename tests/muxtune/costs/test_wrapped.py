"""Costs of one's own: asked by everybody along one way, never lost, and with an identity of their own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest

from muxtune.costs import AnalyticCosts, CostModel, ProfiledCosts, WrappedCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import COLLECTIVE_KINDS, PHASES, Operator
from muxtune.planning.decisions.options import FREE
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import plan_problem
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload
from sim import plan_costs, search_problem, simulate_operators
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators
from tests.muxtune.planning.problems import FakeCosts, make_problem
from tests.muxtune.policies.gpus import gpu_problem

LINEAR = Operator("linear", (4096, 4096, 512))
PAIRS = [Operator("lora", (4096, 4096, r, 256)) for r in (8, 16)]


@dataclass(frozen=True)
class Scaled(WrappedCosts):
    """Some kinds, or all, take longer."""

    inner: CostModel
    factor: float
    kinds: tuple[str, ...] = ()

    def launch_s(self, ops, phase, seconds):
        return seconds * (self.factor if not self.kinds or ops[0].kind in self.kinds else 1.0)


@dataclass(frozen=True)
class Interrupted(WrappedCosts):
    """Every action takes longer by a time."""

    inner: CostModel
    pause_s: float

    def fixed_s(self, phase):
        return self.pause_s


class Doubled(AnalyticCosts):
    """A subclass, where one might wrap."""

    def latency_s(self, op, phase):
        return 2.0 * super().latency_s(op, phase)


def with_costs(problem: PlanningProblem, costs: CostModel) -> PlanningProblem:
    return PlanningProblem(Workload(tasks=tuple(problem.tasks)), problem.model, problem.cluster, costs)


def decisions(plan):
    return plan.parallelism, plan.htasks, plan.buckets, plan.template


@pytest.mark.parametrize("name", ["shard", "adapters", "both", "whole"])
def test_a_term_survives_whatever_else_is_asked_for(name):
    stock = gpu_problem(count=2).costs
    costs = Scaled(stock, 3.0)
    change = {
        "whole": lambda each: each,
        "shard": lambda each: each.shard(2),
        "adapters": lambda each: each.with_adapters("separate"),
        "both": lambda each: each.shard(4).with_adapters("separate").shard(1),
    }[name]
    own, theirs = change(costs), change(stock)
    assert isinstance(own, Scaled)
    with costs.exploring():
        for phase in PHASES:
            assert own.latency_s(LINEAR, phase) == 3.0 * theirs.latency_s(LINEAR, phase)
            assert own.group_latency_s(PAIRS, phase) == 3.0 * theirs.group_latency_s(PAIRS, phase)
            tokens = np.array([8, 64, 4096])
            one_by_one = [own.latency_s(Operator("linear", (4096, 4096, t)), phase) for t in tokens.tolist()]
            np.testing.assert_allclose(own.linear_latencies_s(4096, 4096, tokens, phase), one_by_one)


@pytest.mark.parametrize("tp", [1, 2])
def test_all_decisions_stay_and_all_times_scale_if_everything_does(tp):
    """Estimates, bounds, exact prices and the simulation are along one way, or something would differ."""
    options = replace(FREE, tp=tp)
    problem = gpu_problem()
    stock = search_problem(problem, options=options)
    slower = search_problem(with_costs(problem, Scaled(problem.costs, 2.0)), options=options)
    assert decisions(slower) == decisions(stock)
    assert slower.predicted.iteration_s == pytest.approx(2 * stock.predicted.iteration_s, rel=1e-12)


def test_a_term_decides():
    problem = gpu_problem("testbed-c", count=2)
    stock = plan_problem(problem)[0]
    assert stock.parallelism.tp > 1  # else the case shows nothing
    costs = Scaled(problem.costs, 100.0, tuple(sorted(COLLECTIVE_KINDS)))
    assert plan_problem(with_costs(problem, costs))[0].parallelism.tp == 1


def test_a_fixed_time_per_action_is_in_all_prices():
    problem, pause_s = gpu_problem(count=2), 1e-3
    paused = with_costs(problem, Interrupted(problem.costs, pause_s))
    options = replace(FREE, tp=1, pp=1, dp=1, orchestration="sequential")
    stock, own = (search_problem(each, options=options) for each in (problem, paused))
    actions = sum(2 * htask.microbatches for htask in own.htasks)
    again = with_costs(problem, Interrupted(problem.costs, 0.0))
    assert search_problem(again, options=options).predicted.iteration_s == stock.predicted.iteration_s
    bare_s = own.predicted.iteration_s - actions * pause_s
    assert stock.predicted.iteration_s <= bare_s < own.predicted.iteration_s
    played = simulate_operators(own, paused.costs).predicted.iteration_s
    assert played == pytest.approx(own.predicted.iteration_s, rel=1e-9)


def test_operators_are_simulated_with_the_term():
    problem = with_costs(gpu_problem(count=3), Scaled(gpu_problem(count=3).costs, 5.0, ("attention",)))
    plan = search_problem(problem, options=replace(FREE, tp=2))
    played = simulate_operators(plan, problem.costs)
    assert played.predicted.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=1e-9)


def test_identities_tell_costs_apart():
    stock = gpu_problem(count=2).costs
    refs = [
        stock.ref,
        Scaled(stock, 2.0).ref,
        Scaled(stock, 3.0).ref,
        Scaled(stock, 3.0, ("linear",)).ref,
        Scaled(Scaled(stock, 2.0), 3.0).ref,
        Interrupted(stock, 1e-4).ref,
        WrappedCosts(stock).ref,
    ]
    assert len({ref.digest for ref in refs}) == len(refs)
    assert len({ref.profile_id for ref in refs}) == len(refs)
    assert {ref.device for ref in refs} == {stock.ref.device}
    assert Scaled(stock, 2.0).ref == Scaled(stock, 2.0).ref
    assert Scaled(stock, 2.0).ref.profile_id.startswith(f"{stock.ref.profile_id}+Scaled-")


def test_a_plan_names_the_costs_and_is_not_taken_for_one_of_the_stock():
    problem = with_costs(gpu_problem(count=2), Scaled(gpu_problem(count=2).costs, 2.0))
    plan = plan_problem(problem)[0]
    assert plan.costs.digest == problem.costs.ref.digest
    with pytest.raises(SpecError, match=r"profile = 'analytic-a40-\w+': expected analytic-a40-\w+\+Scaled"):
        plan_costs(plan)


def test_a_subclass_of_the_stock_costs_decides_everywhere_too():
    problem = gpu_problem()
    own = Doubled("a40", problem.model, interconnect_of(problem.cluster))
    for costs in (own, own.shard(2), own.with_adapters("separate").shard(2)):
        assert type(costs) is Doubled
    stock = problem.costs
    for phase in PHASES:
        tokens = np.array([8, 512])
        found = own.linear_latencies_s(4096, 4096, tokens, phase)
        np.testing.assert_allclose(found, 2 * stock.linear_latencies_s(4096, 4096, tokens, phase), rtol=1e-12)
        assert own.group_latency_s(PAIRS, phase) == pytest.approx(2 * stock.group_latency_s(PAIRS, phase))
    assert own.ref.digest != stock.ref.digest
    stock_plan, plan = (plan_problem(each)[0] for each in (problem, with_costs(problem, own)))
    assert decisions(plan) == decisions(stock_plan)
    assert plan.predicted.iteration_s == pytest.approx(2 * stock_plan.predicted.iteration_s, rel=1e-12)


def test_a_subclass_of_profiled_costs_has_an_identity_of_its_own():
    class Slower(ProfiledCosts):
        def latency_s(self, op, phase):
            return 2.0 * super().latency_s(op, phase)

    profile = make_profile(analytic_law(), operators())
    stock, own = (cls(profile, profile.model) for cls in (ProfiledCosts, Slower))
    assert stock.ref == profile.ref
    assert own.ref.digest != stock.ref.digest
    assert type(own.shard(2)) is Slower


def test_costs_need_not_be_hashable_and_no_more_than_five_things():
    @dataclass
    class Flat(CostModel):
        """Every operator takes as long."""

        seconds: float = 1e-4

        @property
        def ref(self):
            return CostsRef(profile_id="flat", device="fake", digest="flat")

        def latency_s(self, op, phase):
            return self.seconds

        def action_s(self, operators_s, phase):
            return operators_s

        def shard(self, tp):
            return self

        def exploring(self):
            return nullcontext()

    with pytest.raises(TypeError, match="unhashable"):
        hash(Flat())
    plan = plan_problem(make_problem(ranks=1, costs=Flat()))[0]
    assert len(plan.htasks) == 1  # the tokens cost nothing


def test_equal_costs_of_two_objects_are_not_taken_for_one():
    slow, fast = FakeCosts(launch_s=1e-2), FakeCosts(launch_s=1e-6)
    slow.__class__.__eq__ = lambda self, other: isinstance(other, FakeCosts)
    slow.__class__.__hash__ = lambda self: 0
    try:
        first = plan_problem(make_problem(costs=slow))[0].predicted.iteration_s
        plan_problem(make_problem(costs=fast))
        assert plan_problem(make_problem(costs=slow))[0].predicted.iteration_s == first
    finally:
        del slow.__class__.__eq__, slow.__class__.__hash__


def test_products_are_priced_together_as_one_by_one():
    costs = gpu_problem(count=2).costs
    tokens = np.array([8, 64, 1000, 4096])
    for phase in PHASES:
        one_by_one = [costs.latency_s(Operator("linear", (4096, 11008, t)), phase) for t in tokens.tolist()]
        together = costs.linear_latencies_s(4096, 11008, tokens, phase)
        np.testing.assert_allclose(together, one_by_one, rtol=1e-12)
