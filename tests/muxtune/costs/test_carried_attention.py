"""Attention to keys from earlier micro-batches: priced from attention of whole sequences."""

from __future__ import annotations

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, ProfiledCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.operator_work import operator_work
from muxtune.graph.operators import PHASES, Operator
from muxtune.model import load_model_spec
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators


def carried(sequences: int, queries: int, keys: int) -> Operator:
    return Operator("carried_attention", (sequences, queries, keys))


@pytest.fixture(params=["profiled", "analytic"])
def costs(request):
    if request.param == "profiled":
        return ProfiledCosts(make_profile(analytic_law(), operators()), MODEL)
    model = load_model_spec("llama2-7b", dtype="bfloat16")
    return AnalyticCosts("a40", model, interconnect_of(load_cluster("testbed-a")))


@pytest.mark.parametrize("phase", PHASES)
def test_scores_are_a_rectangle_and_a_triangle(phase):
    """So many as a whole sequence has more than the part before the queries."""
    whole, before, part = (
        operator_work(op, phase, MODEL).flops
        for op in (Operator("attention", (3, 96)), Operator("attention", (3, 64)), carried(3, 32, 96))
    )
    assert part == pytest.approx(whole - before, rel=1e-12)


@pytest.mark.parametrize("phase", PHASES)
def test_it_costs_more_than_the_queries_alone_and_less_than_all_keys(costs, phase):
    alone, all_ = (costs.latency_s(Operator("attention", (4, n)), phase) for n in (128, 1024))
    seconds = [costs.latency_s(carried(4, 128, keys), phase) for keys in (256, 512, 1024)]
    assert alone < seconds[0] < seconds[1] < seconds[2] < all_


@pytest.mark.parametrize("phase", PHASES)
def test_without_earlier_keys_it_is_nearly_attention(costs, phase):
    same = costs.latency_s(Operator("attention", (4, 256)), phase)
    assert costs.latency_s(carried(4, 256, 256), phase) == pytest.approx(same, rel=0.15)


def test_it_is_measured_by_attention_of_as_many_scores():
    analytic = analytic_law()

    def law(op, phase):
        return analytic(op, phase) * (0.25 if op.kind == "attention" else 1.0)

    profile = make_profile(law, operators())
    costs = ProfiledCosts(profile, MODEL)
    op = carried(4, 32, 128)
    ratio = costs.latency_s(op, "fwd") / costs.analytic.latency_s(op, "fwd")
    like = Operator("attention", (4, 64))
    assert ratio == pytest.approx(
        costs.latency_s(like, "fwd") / costs.analytic.latency_s(like, "fwd"), rel=1e-9
    )
