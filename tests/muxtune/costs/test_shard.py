"""Costs of one of several tensor-parallel ranks, and of adapters that share a launch."""

import pickle
import warnings

import pytest

from muxtune.cluster import LinkSpec, load_cluster
from muxtune.costs import AnalyticCosts, ExtrapolationWarning, ProfiledCosts, RooflineCosts
from muxtune.costs.adapters import Pair, grouped_seconds
from muxtune.costs.analytic import FACTOR_BYTES
from muxtune.costs.collectives import interconnect_of
from muxtune.graph.operators import PHASES, Operator
from muxtune.model import load_model_spec
from muxtune.support.errors import SpecError
from tests.muxtune.costs.synthetic import COEFFICIENTS, MODEL, analytic_law, make_profile, operators

LLAMA_7B = load_model_spec("llama2-7b")


def analytic(**options):
    return AnalyticCosts("a40", LLAMA_7B, interconnect_of(load_cluster("testbed-a")), **options)


def profiled(extra=()):
    law = analytic_law()
    return ProfiledCosts(make_profile(lambda op, phase: 1.5 * law(op, phase), [*operators(), *extra]), MODEL)


@pytest.mark.parametrize("make", [analytic, profiled, lambda: RooflineCosts(COEFFICIENTS, MODEL)])
def test_a_shard_has_fewer_heads_a_narrower_mlp_and_less_of_the_vocabulary(make):
    costs = make()
    half = costs.shard(2)
    assert half.ref == costs.ref
    with costs.exploring():
        for kind, dims in (("attention", (4, 256)), ("activation", (1024,)), ("head", (256,))):
            for phase in PHASES:
                op = Operator(kind, dims)
                assert half.latency_s(op, phase) < costs.latency_s(op, phase)
        norm = Operator("norm", (1024,))  # works on the hidden states, which are whole
        assert half.latency_s(norm, "fwd") == costs.latency_s(norm, "fwd")
    with pytest.raises(SpecError, match=r"parallelism.tp = 5: expected a divisor of"):
        costs.shard(5)


@pytest.mark.parametrize("make", [analytic, profiled])
def test_shards_are_made_once_and_follow_their_whole_to_workers(make):
    costs = make()
    assert costs.shard(2) is costs.shard(2)
    assert costs.shard(1) is costs
    copied = pickle.loads(pickle.dumps(costs))
    op = Operator("activation", (256,))
    assert copied.shard(2).latency_s(op, "fwd") == costs.shard(2).latency_s(op, "fwd")


def test_measured_ratios_hold_for_shards():
    costs = profiled()
    half = costs.shard(2)
    with costs.exploring():
        for op in (Operator("activation", (300,)), Operator("attention", (4, 100)), Operator("head", (100,))):
            ratio = half.latency_s(op, "fwd") / half.analytic.latency_s(op, "fwd")
            assert ratio == pytest.approx(
                costs.latency_s(op, "fwd") / costs.analytic.latency_s(op, "fwd"), rel=1e-12
            )


def test_widths_that_were_not_measured_are_told_once_for_a_backbone_and_its_shards():
    costs = profiled()
    half = costs.shard(2)
    op = Operator("linear", (256, 688, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with costs.exploring():
            half.latency_s(op, "fwd")
            costs.shard(4).latency_s(op, "fwd")
    with pytest.warns(ExtrapolationWarning, match="linear at in_features=256,out_features=688"):
        half.latency_s(op, "fwd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs.shard(4).latency_s(op, "fwd")
        costs.latency_s(Operator("linear", (256, 1400, 256)), "fwd")


def test_sums_over_two_ranks_cost_what_was_measured():
    measured = [Operator("all_reduce", (n, 2)) for n in (4096, 1 << 20)]
    costs = profiled(measured)
    law = analytic_law()
    for op in measured:
        assert costs.shard(2).latency_s(op, "fwd") == pytest.approx(1.5 * law(op, "fwd"), rel=1e-9)
    with pytest.warns(
        ExtrapolationWarning, match=r"all_reduce at bytes=4096,ranks=4 is a factor 2\.00 outside"
    ):
        costs.shard(4).latency_s(Operator("all_reduce", (4096, 4)), "fwd")


def test_adapters_of_several_tasks_share_their_launches_on_a_gpu():
    costs = analytic()
    ops = [
        Operator("lora", (4096, 4096, r, tokens)) for r, tokens in ((4, 128), (16, 512), (64, 0), (8, 256))
    ]
    for phase in PHASES:
        pairs = [Pair(in_features=i, out_features=o, r=r, tokens=t) for i, o, r, t in (op.dims for op in ops)]
        together_s = grouped_seconds(costs.gpu, pairs, phase, element_bytes=2, factor_bytes=FACTOR_BYTES)
        assert costs.group_latency_s(ops, phase) == pytest.approx(together_s, rel=1e-12)
        assert together_s < sum(costs.latency_s(op, phase) for op in ops)
        assert costs.group_latency_s(ops[:1], phase) == costs.latency_s(ops[0], phase)
    assert costs.group_latency_s([Operator("lora", (64, 64, 4, 0))] * 2, "fwd") == 0.0


def test_a_group_is_launched_beside_a_product_of_all_its_tokens():
    slow = analytic(host_launch_s=1.0)
    ops = [Operator("lora", (64, 64, 4, 16))] * 3
    assert slow.group_latency_s(ops, "fwd") == pytest.approx(3.0)  # kernels of the group, not of each


def test_operations_of_torch_and_what_was_measured_add_up():
    ops = [Operator("lora", (256, 256, r, 100)) for r in (4, 8)]
    for costs in (analytic(adapter_kernels="torch"), profiled()):
        for phase in PHASES:
            expected = sum(costs.latency_s(op, phase) for op in ops)
            assert costs.group_latency_s(ops, phase) == pytest.approx(expected, rel=1e-12)


def test_ranks_of_a_stage_are_neighbours():
    """Two ranks share an NVLink bridge; four also cross PCIe."""
    costs = analytic()
    two, four = (costs.shard(n).latency_s(Operator("all_reduce", (1 << 24, n)), "fwd") for n in (2, 4))
    assert four > 2 * two
    own = load_cluster("testbed-a").model_copy(
        update={"within_node": LinkSpec(name="own", latency_s=1e-5, bandwidth_bytes_per_s=5e10)}
    )
    alike = AnalyticCosts("a40", LLAMA_7B, interconnect_of(own))
    two, four = (alike.shard(n).latency_s(Operator("all_reduce", (1 << 24, n)), "fwd") for n in (2, 4))
    assert four < 2 * two
