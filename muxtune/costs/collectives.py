"""Seconds of transfers and collectives on a cluster, with the algorithm that is fastest there.

Within a node an operation runs on the node's links (:mod:`muxtune.costs.links`), across nodes as the fastest
of

ring          all ranks in one ring, at the pace of its slowest link and the latency of the network
tree          up and down a tree of nodes, with a tree of ranks in each (all-reduce only)
hierarchical  reduce-scatter inside each node, all-reduce of each shard across the nodes, all-gather inside;
              only where the caller says that its runtime does this: all-reduces by NCCL on two nodes of 2, 4
              and 8 A100 were measured slower than that, and as slow as ring and tree
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from muxtune.cluster import LOOPBACK, ClusterSpec, LinkSpec
from muxtune.costs.links import (
    Line,
    LinkCoefficients,
    flat_ring_lines,
    flat_tree_lines,
    link_from_spec,
    load_link,
)
from muxtune.costs.measured_links import link_from_profile
from muxtune.costs.profile import Profile
from muxtune.placement import Route, route_among
from muxtune.support.errors import SpecError

FloatArray = NDArray[np.float64]
Bytes = TypeVar("Bytes", float, FloatArray)
"""One size or an array of sizes; seconds come in the same form."""
Ranks = int | Route
"""Where the ranks of a group are, or how many of the cluster's first ranks they are."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """An operation at some sizes."""

    seconds: FloatArray
    algorithms: tuple[str, ...]
    """Candidates."""
    chosen: NDArray[np.intp]
    """Index of the candidate that each size takes."""

    @property
    def algorithm(self) -> list[str]:
        """Name of the algorithm that each size takes."""
        return [self.algorithms[i] for i in np.atleast_1d(self.chosen)]


class Interconnect:
    """Links of a cluster as a cost model.

    Args:
        cluster: Nodes, devices per node.
        within: Links inside a node; of neighbours 0-1, 2-3, ... only, if there are ``beyond_pairs``.
        beyond_pairs: Links between ranks of a node that are no such pair, where they differ.
        between: Links between nodes, where there are several.
        hierarchical: Whether the runtime works hierarchically where that is faster.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        within: LinkCoefficients,
        *,
        beyond_pairs: LinkCoefficients | None = None,
        between: LinkCoefficients | None = None,
        hierarchical: bool = False,
    ) -> None:
        self.cluster = cluster
        self._within = within
        self._beyond_pairs = beyond_pairs
        self._between = between
        self._hierarchical = hierarchical

    @property
    def links(self) -> tuple[LinkCoefficients, ...]:
        """What these costs rest on."""
        return tuple(link for link in (self._within, self._beyond_pairs, self._between) if link is not None)

    def send_recv_s(self, bytes_: Bytes, *, across_nodes: bool = False) -> Bytes:
        """Seconds until a neighbour has a message.

        Inside a node it is the slowest neighbour's link: where pairs are bridged and a node has several
        pairs, a pipeline also crosses between pairs. :meth:`message_s` prices a given link,
        :meth:`transfer_s` given ranks.
        """
        inside = min(2, self.cluster.devices_per_node)
        ranks_per_node = (1, 1) if across_nodes else (inside,)
        return self.message_s(bytes_, Route(ranks_per_node, self.cluster.devices_per_node <= 2))

    def message_s(self, bytes_: Bytes, route: Route) -> Bytes:
        """Seconds until one of two ranks has a message of the other."""
        link = self._network() if route.nodes > 1 else self._links_inside(route)
        return _as_given(_fastest(link.transfer_lines(), bytes_), bytes_)

    def transfer_s(self, bytes_: Bytes, source: int, target: int) -> Bytes:
        """Seconds until rank ``target`` has a message of rank ``source``; nothing to itself."""
        if source == target:
            return bytes_ * 0.0
        return self.message_s(bytes_, route_among((source, target), self.cluster.devices_per_node))

    def all_reduce_s(self, bytes_: Bytes, ranks: Ranks, *, per_node: int | None = None) -> Bytes:
        """Seconds until each of ``ranks`` has the sum of tensors of ``bytes_``; see :meth:`all_reduce`."""
        return _as_given(self.all_reduce(bytes_, ranks, per_node=per_node), bytes_)

    def reduce_scatter_s(self, bytes_: Bytes, ranks: Ranks, *, per_node: int | None = None) -> Bytes:
        """Seconds until each rank has its shard of the sum of tensors of ``bytes_``."""
        return _as_given(self.reduce_scatter(bytes_, ranks, per_node=per_node), bytes_)

    def all_gather_s(self, bytes_: Bytes, ranks: Ranks, *, per_node: int | None = None) -> Bytes:
        """Seconds until each rank has the whole tensor of ``bytes_``, of which each had a shard.

        As long as the reduce-scatter: the same bytes pass the same links the other way.
        """
        return self.reduce_scatter_s(bytes_, ranks, per_node=per_node)

    def all_reduce(
        self, bytes_: float | FloatArray, ranks: Ranks, *, per_node: int | None = None
    ) -> Estimate:
        """Seconds and algorithm of an all-reduce.

        Args:
            bytes_: Size of the whole tensor, the same on each rank.
            ranks: Participants: where they are, or how many.
            per_node: If ``ranks`` is a number, how many of them share a node; as many as a node has, unless
                given.

        Raises:
            UserError: Several nodes are needed and the cluster has one.
        """
        return self._collective(bytes_, ranks, per_node, passes=2)

    def reduce_scatter(
        self, bytes_: float | FloatArray, ranks: Ranks, *, per_node: int | None = None
    ) -> Estimate:
        """Seconds and algorithm of a reduce-scatter or all-gather; arguments as of :meth:`all_reduce`."""
        return self._collective(bytes_, ranks, per_node, passes=1)

    def _collective(
        self, bytes_: float | FloatArray, ranks: Ranks, per_node: int | None, *, passes: int
    ) -> Estimate:
        route = self._first_ranks(ranks, per_node) if isinstance(ranks, int) else ranks
        nodes, inside = route.nodes, route.most_per_node
        if route.ranks == 1:
            return _fastest([Line("none", 0.0, 0.0)], bytes_)
        within = self._links_inside(route)
        if nodes == 1:
            return _fastest(_lines(within, route.ranks, passes), bytes_)
        network = self._network()
        if inside == 1:
            return _fastest(_lines(network, nodes, passes), bytes_)
        lines = flat_ring_lines(network, within, route, passes=passes)
        if passes == 2:
            lines += flat_tree_lines(network, within, route)
        flat = _fastest(lines, bytes_)
        equal = route.fewest_per_node == inside  # else the shards would not match
        if not self._hierarchical or not equal:
            return flat
        share = min(1.0, (network.flows_per_node or inside) / inside)
        across = _fastest(_lines(network, nodes, passes, share=share), np.asarray(bytes_) / inside)
        seconds = across.seconds + passes * _fastest(within.ring_pass_lines(inside), bytes_).seconds
        taken = seconds < flat.seconds
        return Estimate(
            np.where(taken, seconds, flat.seconds),
            (*flat.algorithms, "hierarchical"),
            np.where(taken, len(flat.algorithms), flat.chosen),
        )

    def _first_ranks(self, ranks: int, per_node: int | None) -> Route:
        """The first so many ranks of the cluster, or of each node the first ``per_node``."""
        assert ranks > 0, ranks
        per_node = min(ranks, per_node or self.cluster.devices_per_node)
        full, rest = divmod(ranks, per_node)
        return Route((per_node,) * full + (rest,) * bool(rest), per_node <= 2)

    def _links_inside(self, route: Route) -> LinkCoefficients:
        """Links inside the nodes of a group; the slower ones decide."""
        if self._beyond_pairs is None or route.paired:
            return self._within
        return self._beyond_pairs

    def _network(self) -> LinkCoefficients:
        if self._between is None:
            expected = f"at most {self.cluster.devices_per_node}: the cluster is one node"
            raise SpecError(f"ranks of {self.cluster.name}", self.cluster.ranks, expected)
        return self._between


def interconnect_of(
    cluster: ClusterSpec, *, profile: Profile | None = None, hierarchical: bool = False
) -> Interconnect:
    """Links of a cluster: shipped coefficients of its device, or a link of its own.

    Args:
        cluster: The cluster.
        profile: Profile of this machine; tells what gloo over loopback takes.
        hierarchical: Whether the runtime works hierarchically where that is faster.

    Raises:
        UserError: There are no coefficients of such a link, or a profile is needed.
    """

    def coefficients(link: str | LinkSpec) -> LinkCoefficients:
        if link == LOOPBACK:
            if profile is None:
                raise SpecError(
                    f"cluster.within_node of {cluster.name}",
                    link,
                    "a profile, which has what gloo takes here",
                )
            return link_from_profile(profile)
        if isinstance(link, LinkSpec):
            return link_from_spec(link, cluster.device.name)
        return load_link(link, cluster.device.name)

    within, between = cluster.within_node, cluster.between_nodes
    return Interconnect(
        cluster,
        coefficients(within),
        beyond_pairs=coefficients("pcie") if within == "nvlink-pair" else None,
        between=None if between is None else coefficients(between),
        hierarchical=hierarchical,
    )


def _lines(links: LinkCoefficients, ranks: int, passes: int, *, share: float = 1.0) -> list[Line]:
    if passes == 1:
        return links.ring_pass_lines(ranks, share=share)
    return links.all_reduce_lines(ranks, share=share)


def _fastest(lines: Sequence[Line], bytes_: float | FloatArray) -> Estimate:
    sizes = np.asarray(bytes_, dtype=np.float64)
    seconds = [line.latency_s + line.s_per_byte * sizes for line in lines]
    candidates = np.stack(seconds)
    algorithms = tuple(line.algorithm for line in lines)
    return Estimate(candidates.min(axis=0), algorithms, candidates.argmin(axis=0))


def _as_given(estimate: Estimate, bytes_: Bytes) -> Bytes:
    """Seconds as an array for an array of sizes, as a float for one size."""
    if isinstance(bytes_, np.ndarray):
        return estimate.seconds
    return float(estimate.seconds)
