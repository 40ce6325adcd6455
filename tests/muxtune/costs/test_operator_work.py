"""Work of collectives, and what it makes of their costs."""

import pytest

from muxtune.costs import ExtrapolationWarning, ProfiledCosts, RooflineCosts, fit_coefficients
from muxtune.costs.operator_work import OperatorWork, operator_work
from muxtune.graph.operators import COLLECTIVE_KINDS, FWD_ONLY, LINK_KINDS, Operator
from tests.muxtune.costs.synthetic import COEFFICIENTS, MODEL, analytic_law, make_profile, operators

RINGS = [Operator(kind, (n, 2)) for kind in sorted(COLLECTIVE_KINDS) for n in (4096, 1 << 20, 8 << 20)]


def seconds_of_ring(parts, ranks, rounds):
    """Steps of a ring one by one: in each, every rank sends a part to its neighbour."""
    steps = rounds * (ranks - 1)
    return sum(COEFFICIENTS.link_latency_s + parts / COEFFICIENTS.link_bytes_per_s for _ in range(steps))


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("kind", "rounds"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)])
def test_a_collective_costs_its_steps_around_the_ring(kind, rounds, ranks):
    op = Operator(kind, (24_000, ranks))
    expected = seconds_of_ring(24_000 / ranks, ranks, rounds)
    assert RooflineCosts(COEFFICIENTS, MODEL).latency_s(op, "fwd") == pytest.approx(expected)


def test_a_message_is_one_step():
    assert operator_work(Operator("p2p", (4096,)), "fwd", MODEL) == OperatorWork(0.0, 4096.0, 1)


@pytest.mark.parametrize("kind", sorted(COLLECTIVE_KINDS))
def test_nobody_to_share_with_costs_nothing(kind):
    alone = Operator(kind, (4096, 1))
    assert RooflineCosts(COEFFICIENTS, MODEL).latency_s(alone, "fwd") == 0.0
    costs = ProfiledCosts(make_profile(analytic_law(), [*operators(), *RINGS]), MODEL)
    assert costs.latency_s(alone, "fwd") == 0.0


def test_collectives_are_links_and_have_no_backward():
    assert COLLECTIVE_KINDS < LINK_KINDS < FWD_ONLY


def test_measured_collectives_do_not_bend_the_fit_of_the_device():
    law = analytic_law()

    def slow_collectives(op, phase):
        return law(op, phase) * (50 if op.kind in COLLECTIVE_KINDS else 1)

    without = fit_coefficients(make_profile(law, operators()))
    assert fit_coefficients(make_profile(slow_collectives, [*operators(), *RINGS])) == without


def test_collectives_that_a_profile_lacks_cost_what_its_link_says():
    costs = ProfiledCosts(make_profile(analytic_law(), operators()), MODEL)
    op = Operator("all_reduce", (4096, 2))
    with pytest.warns(ExtrapolationWarning, match="measured no all_reduce; its cost is that of messages"):
        seconds = costs.latency_s(op, "fwd")
    assert seconds == costs.analytic.latency_s(op, "fwd") > 0


def test_measured_collectives_are_interpolated_over_bytes_and_ranks():
    law = analytic_law()
    grid = [Operator("all_reduce", (n, ranks)) for n in (4096, 1 << 20) for ranks in (2, 8)]
    profile = make_profile(lambda op, phase: 3 * law(op, phase), [*operators(), *grid])
    costs = ProfiledCosts(profile, MODEL)
    op = Operator("all_reduce", (100_000, 4))
    analytic_s = costs.analytic.latency_s(op, "fwd")
    assert costs.latency_s(op, "fwd") == pytest.approx(3 * law(op, "fwd"), rel=0.02)
    assert analytic_s > 0
