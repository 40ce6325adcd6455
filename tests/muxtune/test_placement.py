"""Where ranks stand, and what links their groups take."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.cluster import load_cluster
from muxtune.model import PRESETS
from muxtune.placement import Placement, Route, route_among
from muxtune.planning.decisions.options import FREE
from muxtune.planning.problem.meshes import candidate_meshes

PAIR, ACROSS_PAIRS = Route((2,), paired=True), Route((2,), paired=False)
TWO_NODES = Route((1, 1), paired=True)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))
def test_places_and_ranks_are_one_to_one_shards_first_replicas_last(tp, pp, dp, per_node):
    placement = Placement(tp, pp, dp, per_node)
    places = list(product(range(dp), range(pp), range(tp)))
    assert [placement.rank(*place) for place in places] == list(range(tp * pp * dp))
    assert [placement.coordinates(rank) for rank in range(tp * pp * dp)] == places


def test_replicas_of_a_stage_may_stand_on_other_nodes():
    placement = Placement(tp=2, pp=4, dp=2, devices_per_node=2)
    assert placement.replica_group(0, 0) == (0, 8)
    assert [placement.node(rank) for rank in placement.replica_group(0, 0)] == [0, 4]
    assert {placement.replica_routes(stage) for stage in range(4)} == {(TWO_NODES,)}
    assert {placement.shard_routes(stage) for stage in range(4)} == {(PAIR,)}
    assert placement.message_routes() == (TWO_NODES,)


def test_replicas_in_a_node_are_bridged_only_if_they_are_neighbours():
    """Devices 0 and 1, and 2 and 3, are pairs."""
    assert Placement(1, 1, 2, 4).replica_routes(0) == (PAIR,)
    assert Placement(1, 2, 2, 4).replica_routes(0) == (ACROSS_PAIRS,)
    assert Placement(2, 1, 2, 4).replica_routes(0) == (ACROSS_PAIRS,)
    assert Placement(1, 2, 2, 4).boundary_routes(0) == (PAIR,)
    assert [Placement(1, 4, 1, 4).boundary_routes(stage) for stage in range(3)] == [
        (PAIR,),
        (ACROSS_PAIRS,),
        (PAIR,),
    ]


def test_every_stage_has_routes_of_its_own_where_replicas_do_not_fill_nodes():
    """Six ranks a replica on nodes of eight: the second replica begins on the first node."""
    placement = Placement(tp=2, pp=3, dp=2, devices_per_node=8)
    assert placement.replica_group(0, 0) == (0, 6)
    assert placement.replica_group(1, 0) == (2, 8)
    assert placement.replica_routes(0) == (ACROSS_PAIRS,)
    assert placement.replica_routes(1) == placement.replica_routes(2) == (TWO_NODES,)
    # Between stages 0 and 1, the first replica stays in its node and the second leaves it.
    assert placement.boundary_routes(0) == tuple(sorted((TWO_NODES, ACROSS_PAIRS)))
    assert placement.boundary_routes(1) == (ACROSS_PAIRS,)


def test_shards_of_a_stage_may_take_different_routes():
    placement = Placement(tp=3, pp=1, dp=2, devices_per_node=4)
    assert placement.replica_group(0, 0) == (0, 3)
    assert placement.replica_group(0, 1) == (1, 4)
    assert placement.replica_routes(0) == tuple(sorted((ACROSS_PAIRS, TWO_NODES)))


@given(st.sets(st.integers(0, 31), min_size=1), st.integers(1, 8))
def test_a_route_counts_ranks_where_they_are(ranks, per_node):
    route = route_among(ranks, per_node)
    counts = [sum(rank // per_node == node for rank in ranks) for node in range(32)]
    assert route.ranks_per_node == tuple(sorted((n for n in counts if n), reverse=True))
    assert (route.ranks, route.nodes) == (len(ranks), sum(n > 0 for n in counts))
    assert (route.most_per_node, route.fewest_per_node) == (max(counts), min(n for n in counts if n))
    neighbours = all(
        a // per_node != b // per_node or a % per_node // 2 == b % per_node // 2
        for a, b in product(ranks, repeat=2)
    )
    assert route.paired == neighbours


@pytest.mark.parametrize("name", ["testbed-a", "testbed-b", "testbed-c", "a100-16"])
def test_shards_are_as_close_as_the_first_ranks_are(name):
    """Collectives inside a stage say how many ranks take part, and not where."""
    cluster = load_cluster(name)
    for shape in candidate_meshes(PRESETS["llama2-7b"], cluster, FREE, idle=True):
        first = (route_among(range(shape.tp), cluster.devices_per_node),)
        placement = shape.on(cluster)
        assert {placement.shard_routes(stage) for stage in range(shape.pp)} == {first}, shape
