"""Collectives: what any interconnect obeys, what the textbook says of one link, and what ships."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.cluster import TESTBEDS, ClusterSpec, DeviceSpec, LinkSpec, load_cluster
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.links import link_names, load_link
from muxtune.graph.operators import Operator
from muxtune.placement import Route
from muxtune.support.errors import UserError
from tests.muxtune.costs.synthetic import make_profile

LATENCY_S = 1e-5
BYTES_PER_S = 1e10
LINK = LinkSpec(name="plain", latency_s=LATENCY_S, bandwidth_bytes_per_s=BYTES_PER_S)
SLOW = LinkSpec(name="slow", latency_s=5 * LATENCY_S, bandwidth_bytes_per_s=BYTES_PER_S / 20)
DEVICE = DeviceSpec(name="some-gpu", kind="cuda", memory_bytes=10**10)
SIZES = np.geomspace(1e3, 1e9, 61)

SHIPPED = [*TESTBEDS, "a100-8", "a100-16", "a100-64"]
ALL = [*SHIPPED, "cpu-4"]


def plain(ranks, nodes=1, **options):
    cluster = ClusterSpec(
        name="plain",
        device=DEVICE,
        ranks=ranks,
        nodes=nodes,
        within_node=LINK,
        between_nodes=SLOW if nodes > 1 else None,
    )
    return interconnect_of(cluster, **options)


def named(name):
    """A preset; what a processor's links take, a profile says."""
    transfers = [Operator("p2p", (n,)) for n in (4096, 1 << 20, 8 << 20)]
    profile = make_profile(lambda op, phase: LATENCY_S + op.dims[0] / BYTES_PER_S, transfers)
    return interconnect_of(load_cluster(name), profile=profile)


def rank_counts(cluster):
    return [n for n in (2, 3, 4, 6, 8, 16, 32, 64) if n <= cluster.ranks]


@pytest.mark.parametrize("name", ALL)
def test_more_bytes_never_take_less_time(name):
    links = named(name)
    for ranks in rank_counts(links.cluster):
        for operation in (links.all_reduce_s, links.reduce_scatter_s, links.all_gather_s):
            assert (np.diff(operation(SIZES, ranks)) > 0).all(), (operation.__name__, ranks)
    assert (np.diff(links.send_recv_s(SIZES)) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_one_rank_has_nothing_to_do(name):
    links = named(name)
    assert links.all_reduce_s(1e9, 1) == links.reduce_scatter_s(1e9, 1) == links.all_gather_s(1e9, 1) == 0
    assert links.transfer_s(1e9, 0, 0) == 0


@pytest.mark.parametrize("name", ALL)
def test_many_sizes_at_once_are_the_sizes_one_by_one(name):
    links = named(name)
    for ranks in rank_counts(links.cluster):
        one_by_one = [links.all_reduce_s(float(size), ranks) for size in SIZES]
        np.testing.assert_array_equal(links.all_reduce_s(SIZES, ranks), one_by_one)
    assert isinstance(links.send_recv_s(4096), float)


@pytest.mark.parametrize("name", ALL)
def test_an_all_reduce_is_at_most_a_reduce_scatter_and_an_all_gather(name):
    """And not much less where bytes and not latencies count: a ring is just these two."""
    links = named(name)
    for ranks in rank_counts(links.cluster):
        both = links.reduce_scatter_s(SIZES, ranks) + links.all_gather_s(SIZES, ranks)
        whole = links.all_reduce_s(SIZES, ranks)
        assert (whole <= both * (1 + 1e-12)).all(), ranks
        ring = np.array(links.all_reduce(SIZES, ranks).algorithm) == "ring"
        if links.cluster.nodes == 1:
            np.testing.assert_allclose(whole[ring & (SIZES > 1e8)], both[ring & (SIZES > 1e8)], rtol=0.01)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_collective_beats_the_data_sheet(name):
    """Bytes that must pass one rank's link, at the rate of a direction of NVLink or of the network."""
    cluster = load_cluster(name)
    links = interconnect_of(cluster)
    nvlink = {"a40": 56.25e9, "a100": 300e9, "h100": 450e9}[cluster.device.name]
    for ranks in rank_counts(cluster):
        least_s = 2 * (ranks - 1) / ranks * SIZES / nvlink
        assert (links.all_reduce_s(SIZES, ranks) > least_s).all(), ranks
    assert (links.send_recv_s(SIZES) > SIZES / nvlink).all()


def test_a_ring_and_a_tree_follow_the_textbook():
    links = plain(8)
    for ranks in (4, 8):
        ring_s = 2 * (ranks - 1) * LATENCY_S + 2 * (ranks - 1) / ranks * SIZES / BYTES_PER_S
        tree_s = 2 * math.log2(ranks) * LATENCY_S + 2 * SIZES / BYTES_PER_S
        np.testing.assert_allclose(links.all_reduce_s(SIZES, ranks), np.minimum(ring_s, tree_s), rtol=1e-12)
        pass_s = (ranks - 1) * LATENCY_S + (ranks - 1) / ranks * SIZES / BYTES_PER_S
        np.testing.assert_allclose(links.all_gather_s(SIZES, ranks), pass_s, rtol=1e-12)
    np.testing.assert_allclose(links.all_reduce_s(SIZES, 2), LATENCY_S + SIZES / BYTES_PER_S, rtol=1e-12)
    np.testing.assert_allclose(links.send_recv_s(SIZES), LATENCY_S + SIZES / BYTES_PER_S, rtol=1e-12)


def test_small_tensors_take_the_tree_and_large_ones_the_ring():
    # Equal where 2 (n-1) a + 2 (n-1)/n s = 2 log2(n) a + 2 s, that is s = n (n - 1 - log2 n) a B.
    switch = 8 * (8 - 1 - 3) * LATENCY_S * BYTES_PER_S
    estimate = plain(8).all_reduce(np.array([switch * 0.99, switch * 1.01]), 8)
    assert estimate.algorithm == ["tree", "ring"]
    assert plain(8).all_reduce(1e6, 2).algorithm == ["direct"]


@given(st.integers(2, 8), st.sampled_from([2, 4, 8]), st.floats(1e3, 1e9))
def test_nodes_are_never_faster_than_their_network_allows(nodes, per_node, size):
    """Some link out of a node carries (N - 1) / N of the tensor out and back in, at the rate of one flow."""
    for hierarchical in (False, True):
        links = plain(nodes * per_node, nodes, hierarchical=hierarchical)
        least_s = SLOW.latency_s + 2 * (nodes - 1) / nodes * size / SLOW.bandwidth_bytes_per_s
        assert links.all_reduce_s(size, nodes * per_node) >= least_s * (1 - 1e-12)
        assert links.reduce_scatter_s(size, nodes * per_node) >= least_s / 2 * (1 - 1e-12)
        assert links.all_reduce_s(size, nodes * per_node) >= plain(per_node).all_reduce_s(size, per_node)


def test_hierarchy_helps_large_tensors_on_several_nodes_and_is_a_choice():
    size = np.array([1e9])
    flat, hierarchical = plain(16, 4), plain(16, 4, hierarchical=True)
    estimate = hierarchical.all_reduce(size, 16)
    assert estimate.algorithm == ["hierarchical"]
    inside_s = 2 * (3 * LATENCY_S + 0.75 * size / BYTES_PER_S)
    # Of each shard, on a quarter of the node's one flow.
    across_s = 2 * 3 * SLOW.latency_s + 2 * 0.75 * size / SLOW.bandwidth_bytes_per_s
    np.testing.assert_allclose(estimate.seconds, inside_s + across_s, rtol=1e-9)
    assert estimate.seconds < flat.all_reduce(size, 16).seconds
    assert flat.all_reduce(size, 16).algorithm == ["ring"]
    assert hierarchical.all_reduce(size, 4).algorithm == ["ring"]


def test_ranks_may_be_one_per_node():
    links = plain(16, 4)
    spread = links.all_reduce_s(1e8, 4, per_node=1)
    assert spread > links.all_reduce_s(1e8, 4)
    assert spread == pytest.approx(6 * SLOW.latency_s + 1.5 * 1e8 / SLOW.bandwidth_bytes_per_s)


def test_bridged_pairs_are_fast_and_what_leaves_them_takes_pcie():
    links = interconnect_of(load_cluster("testbed-a"))
    assert links.transfer_s(1e8, 0, 1) == links.transfer_s(1e8, 3, 2) < links.transfer_s(1e8, 1, 2)
    assert links.send_recv_s(1e8) == links.transfer_s(1e8, 1, 2)
    assert links.all_reduce_s(1e8, 4) > 2 * links.all_reduce_s(1e8, 2)
    assert {link.link for link in links.links} == {"nvlink-pair", "pcie"}
    pairs = interconnect_of(load_cluster("testbed-b"))
    assert pairs.send_recv_s(1e8) == links.transfer_s(1e8, 0, 1)
    assert pairs.transfer_s(1e8, 1, 2) == pairs.send_recv_s(1e8, across_nodes=True) > pairs.send_recv_s(1e8)


def test_a_switch_keeps_the_rate_of_more_ranks():
    links = interconnect_of(load_cluster("testbed-c"))
    assert links.all_reduce_s(1e8, 8) < 2 * links.all_reduce_s(1e8, 2)


def test_nodes_without_a_network_are_refused():
    with pytest.raises(UserError, match=r"ranks of plain = 4: expected at most 4: the cluster is one node"):
        plain(4).all_reduce_s(1e6, 8)


def test_a_link_without_coefficients_is_refused_with_those_there_are():
    cluster = load_cluster("testbed-a").model_copy(update={"within_node": "nvlink-all"})
    with pytest.raises(UserError, match=r"no coefficients of nvlink-all for device 'a40'; there are infini"):
        interconnect_of(cluster)


def test_shipped_links_say_where_they_come_from():
    for name in link_names():
        link, device = name.rsplit("-", 1)
        coefficients = load_link(link, device)
        assert (coefficients.link, coefficients.device) == (link, device)
        assert len(coefficients.basis) > 20
        assert [entry.ranks for entry in coefficients.all_reduce] == sorted(
            {entry.ranks for entry in coefficients.all_reduce}
        )
        if coefficients.fit is not None:
            assert coefficients.fit.rows > 500
            assert name in coefficients.fit.command
    assert {name for name in link_names() if load_link(*name.rsplit("-", 1)).fit is None} == {
        "infiniband-a40",
        "nvlink-pair-a40",
        "pcie-a40",
    }


def test_a_group_is_priced_where_it_is():
    links = interconnect_of(load_cluster("testbed-a"))
    pair, across = Route((2,), paired=True), Route((2,), paired=False)
    assert links.all_reduce_s(1e8, pair) == links.all_reduce_s(1e8, 2) < links.all_reduce_s(1e8, across)
    assert links.message_s(1e8, pair) == links.transfer_s(1e8, 2, 3)
    assert links.message_s(1e8, across) == links.transfer_s(1e8, 0, 2) > links.message_s(1e8, pair)
    nodes = interconnect_of(load_cluster("testbed-b"))
    spread = Route((1, 1), paired=True)
    assert nodes.all_reduce_s(27e6, spread) == nodes.all_reduce_s(27e6, 2, per_node=1)
    assert nodes.all_reduce_s(27e6, spread) > 1.9 * nodes.all_reduce_s(27e6, pair)
    assert nodes.all_reduce_s(27e6, Route((2, 2), paired=True)) == nodes.all_reduce_s(27e6, 4)


def test_nodes_that_share_a_group_unevenly_leave_by_the_flows_of_the_emptiest():
    links = plain(16, 4)
    ring_s = 2 * 5 * SLOW.latency_s + 2 * 5 / 6 * 1e9 / SLOW.bandwidth_bytes_per_s
    assert links.all_reduce_s(1e9, Route((3, 2, 1), paired=False)) == pytest.approx(ring_s)


def test_pairs_are_counted_inside_of_a_node():
    """Three devices a node: the fourth rank is the first of its node, whose neighbour is the fifth."""
    cluster = load_cluster("testbed-a").model_copy(
        update={"ranks": 6, "nodes": 2, "between_nodes": "infiniband"}
    )
    links = interconnect_of(cluster)
    assert links.transfer_s(1e8, 3, 4) == links.transfer_s(1e8, 0, 1) < links.transfer_s(1e8, 4, 5)
