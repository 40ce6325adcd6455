"""Where each rank of a mesh stands."""

from __future__ import annotations

import pytest

from muxtune.plan import Parallelism
from runtime.mesh import RankMesh

MESH = Parallelism(tp=2, pp=3, dp=2, layers_per_stage=(1, 1, 1))


def test_shards_are_neighbours_then_stages_then_replicas():
    places = [RankMesh(MESH, rank) for rank in range(MESH.ranks)]
    assert [(p.replica, p.stage, p.shard.index) for p in places] == [
        (replica, stage, shard) for replica in range(2) for stage in range(3) for shard in range(2)
    ]
    assert [rank for rank, place in enumerate(places) if place.speaks] == [0, 2, 4]  # one per stage
    assert [rank for rank, place in enumerate(places) if place.first] == [0, 1, 6, 7]
    assert [rank for rank, place in enumerate(places) if place.last] == [4, 5, 10, 11]


@pytest.mark.parametrize("rank", range(MESH.ranks))
def test_messages_stay_in_the_replica_and_shard(rank):
    own = RankMesh(MESH, rank)
    for stage in range(3):
        other = RankMesh(MESH, own.neighbour(stage))
        assert (other.replica, other.stage, other.shard.index) == (own.replica, stage, own.shard.index)
    assert own.neighbour(own.stage) == rank
