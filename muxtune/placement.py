"""Where ranks stand: replica, stage and shard of each, its node, and the links between ranks of a group.

Costs, simulator and runtime ask here alone, so a group is priced where it runs. Ranks are numbered shard by
shard, then stage by stage, then replica by replica, and fill the nodes of the cluster in that order:

    rank = ((replica * pp) + stage) * tp + shard        node = rank // devices_per_node

      tp 2, pp 2, dp 2 on two nodes of four       node 0 | replica 0: stage 0: 0 1, stage 1: 2 3 |
                                                  node 1 | replica 1: stage 0: 4 5, stage 1: 6 7 |

Shards are neighbours; the replicas of a stage stand ``pp * tp`` ranks apart, mostly on other nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True, slots=True, order=True)
class Route:
    """Links between the ranks of a group, as far as their cost depends on them."""

    ranks_per_node: tuple[int, ...]
    """Ranks on every node that has any, most first."""
    paired: bool
    """Whether those of each node belong to one bridged pair: the first and second device, the third and
    fourth, ..."""

    @property
    def ranks(self) -> int:
        """Members of the group."""
        return sum(self.ranks_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that they stand on."""
        return len(self.ranks_per_node)

    @property
    def most_per_node(self) -> int:
        """Ranks on the node that has most of them."""
        return self.ranks_per_node[0]

    @property
    def fewest_per_node(self) -> int:
        """Ranks on the node that has fewest of them, but some."""
        return self.ranks_per_node[-1]


def route_among(ranks: Iterable[int], devices_per_node: int) -> Route:
    """Links between some ranks of a cluster."""
    places = [divmod(rank, devices_per_node) for rank in ranks]
    pairs = {(node, device // 2) for node, device in places}
    per_node = Counter(node for node, _ in places)
    return Route(tuple(sorted(per_node.values(), reverse=True)), len(pairs) == len(per_node))


class Coordinates(NamedTuple):
    """A rank's place in a mesh."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A mesh of ``dp`` replicas, ``pp`` stages and ``tp`` shards on the first ranks of a cluster."""

    tp: int
    pp: int
    dp: int
    devices_per_node: int

    def rank(self, replica: int, stage: int, shard: int) -> int:
        """Rank at a place of the mesh."""
        return (replica * self.pp + stage) * self.tp + shard

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank in the mesh."""
        replica, within = divmod(rank, self.pp * self.tp)
        return Coordinates(replica, *divmod(within, self.tp))

    def node(self, rank: int) -> int:
        """Node that a rank stands on."""
        return rank // self.devices_per_node

    def shard_group(self, replica: int, stage: int) -> tuple[int, ...]:
        """Ranks that share a stage (``tp``)."""
        return tuple(self.rank(replica, stage, shard) for shard in range(self.tp))

    def replica_group(self, stage: int, shard: int) -> tuple[int, ...]:
        """Ranks with the same part of the backbone (``dp``), which sum their gradients."""
        return tuple(self.rank(replica, stage, shard) for replica in range(self.dp))

    def boundary(self, replica: int, stage: int, shard: int) -> tuple[int, int]:
        """Ranks on both sides of the boundary behind a stage (``pp``), which send each other messages."""
        return self.rank(replica, stage, shard), self.rank(replica, stage + 1, shard)

    def shard_routes(self, stage: int) -> tuple[Route, ...]:
        """Links of the ``tp`` groups of a stage, in all replicas; each kind once."""
        return _routes(self, "tp", stage)

    def replica_routes(self, stage: int) -> tuple[Route, ...]:
        """Links of the ``dp`` groups of a stage, of all shards; each kind once."""
        return _routes(self, "dp", stage)

    def boundary_routes(self, stage: int) -> tuple[Route, ...]:
        """Links over the boundary behind a stage, in all replicas and of all shards; each kind once."""
        return _routes(self, "pp", stage)

    def message_routes(self) -> tuple[Route, ...]:
        """Links over any boundary of the pipeline; none if it has one stage."""
        found = {route for stage in range(self.pp - 1) for route in self.boundary_routes(stage)}
        return tuple(sorted(found))


@lru_cache(maxsize=1 << 14)
def _routes(placement: Placement, axis: str, stage: int) -> tuple[Route, ...]:
    p = placement
    replicas, shards = range(p.dp), range(p.tp)
    groups: Iterable[tuple[int, ...]]
    if axis == "tp":
        groups = (p.shard_group(replica, stage) for replica in replicas)
    elif axis == "dp":
        groups = (p.replica_group(stage, shard) for shard in shards)
    else:
        groups = (p.boundary(replica, stage, shard) for replica, shard in product(replicas, shards))
    return tuple(sorted({route_among(group, p.devices_per_node) for group in groups}))
