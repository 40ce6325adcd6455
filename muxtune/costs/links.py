"""Links of a device: seconds of transfers and collectives as alpha-beta lines, with where they come from.

An operation takes the cheapest of a few lines ``latency + bytes / rate``. A line belongs to an algorithm (S
bytes of the whole tensor, n ranks, B bytes per second through one rank's link in one direction):

direct  two ranks exchange everything: 1 step, S / B
tree    up a binary tree and down again: 2 ceil(log2 n) steps, 2 S / B
ring    reduce-scatter and all-gather around a ring: 2 (n - 1) steps, 2 (n - 1) / n S / B

Several lines of one algorithm are the protocols of the library: a fast start with a low rate, or the reverse.
Reduce-scatter and all-gather go around the ring once (directly between two ranks).
"""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from muxtune.cluster import LinkSpec
from muxtune.costs.devices import FitRecord, has_part, load_part
from muxtune.placement import Route
from muxtune.support.errors import UserError

Algorithm = Literal["direct", "tree", "ring"]


def algorithm_steps(algorithm: Algorithm, ranks: int) -> int:
    """Messages one after the other in an all-reduce."""
    return {"direct": 1, "tree": 2 * math.ceil(math.log2(ranks)), "ring": 2 * (ranks - 1)}[algorithm]


def algorithm_load(algorithm: Algorithm, ranks: int) -> float:
    """Bytes through one rank's link in one direction, per byte of the tensor that is all-reduced."""
    return {"direct": 1.0, "tree": 2.0, "ring": 2 * (ranks - 1) / ranks}[algorithm]


_STRICT = ConfigDict(frozen=True, extra="forbid")


class Protocol(BaseModel):
    """One way to run an algorithm."""

    model_config = _STRICT

    algorithm: Algorithm
    step_s: float = Field(ge=0)
    """Latency of each of the algorithm's steps."""
    bandwidth_bytes_per_s: float = Field(gt=0)
    """Rate through one rank's link in one direction."""


class RankProtocols(BaseModel):
    """Protocols among that many ranks; more links and channels are used the more ranks there are."""

    model_config = _STRICT

    ranks: int = Field(gt=1)
    protocols: tuple[Protocol, ...] = Field(min_length=1)


class LinkCoefficients(BaseModel):
    """One kind of link between devices of one kind."""

    model_config = _STRICT

    link: str
    """A topology or network of :mod:`muxtune.cluster`, or the name of a link of one's own."""
    device: str
    kernel_s: float = Field(ge=0)
    """Seconds of an operation that moves nothing."""
    send_recv: tuple[Protocol, ...] = Field(min_length=1)
    all_reduce: tuple[RankProtocols, ...] = Field(min_length=1)
    """Protocols by number of ranks, ascending."""
    flows_per_node: int | None = Field(default=None, gt=0)
    """Ranks of a node that can use a network at the full rate at the same time."""
    basis: str
    """Note on which of the numbers are measured, and how the others follow."""
    fit: FitRecord | None
    """None where nothing was fitted."""

    def transfer_lines(self) -> list[Line]:
        """Lines of a message to a neighbour, per byte of it."""
        return [Line("direct", self.kernel_s + p.step_s, 1 / p.bandwidth_bytes_per_s) for p in self.send_recv]

    def all_reduce_lines(self, ranks: int, *, share: float = 1.0) -> list[Line]:
        """Lines of an all-reduce, per byte of the whole tensor.

        Args:
            ranks: Two or more.
            share: Share of the link's rate that the operation gets.
        """
        return [
            Line(
                p.algorithm,
                self.kernel_s + algorithm_steps(p.algorithm, ranks) * p.step_s,
                algorithm_load(p.algorithm, ranks) / (share * p.bandwidth_bytes_per_s),
            )
            for p in self.protocols_among(ranks)
        ]

    def ring_pass_lines(self, ranks: int, *, share: float = 1.0) -> list[Line]:
        """Lines of a reduce-scatter or an all-gather, once around the ring, per byte of the whole tensor.

        Trees do neither, so their protocols go around the ring here.
        """
        algorithm = "direct" if ranks == 2 else "ring"
        steps, load = ranks - 1, (ranks - 1) / ranks
        return [
            Line(algorithm, self.kernel_s + steps * p.step_s, load / (share * p.bandwidth_bytes_per_s))
            for p in self.protocols_among(ranks)
        ]

    def ring_bytes_per_s(self, ranks: int) -> float:
        """Rate of large tensors through one rank's link."""
        return max(p.bandwidth_bytes_per_s for p in self.protocols_among(ranks))

    def protocols_among(self, ranks: int) -> list[Protocol]:
        """Protocols measured with the next larger number of ranks, or with the largest.

        Two ranks need no tree, and of what two ranks use the fastest start becomes a tree of more.
        """
        known = next((entry for entry in self.all_reduce if entry.ranks >= ranks), self.all_reduce[-1])
        if (ranks == 2) == (known.ranks == 2):
            return list(known.protocols)
        first: Algorithm = "tree" if ranks > 2 and len(known.protocols) > 1 else "ring"
        return [
            p.model_copy(update={"algorithm": first if i == 0 else "ring"})
            for i, p in enumerate(known.protocols)
        ]


class Line(NamedTuple):
    """``latency_s + s_per_byte * bytes``."""

    algorithm: str
    latency_s: float
    s_per_byte: float


def flat_ring_lines(
    network: LinkCoefficients, within: LinkCoefficients, route: Route, *, passes: int
) -> list[Line]:
    """Lines of ``passes`` around a ring through all ranks of all nodes, per byte of the whole tensor.

    As many rings run in parallel as the node with fewest ranks has flows, each leaving it through another
    rank; a step lasts as long as the network's.

    Args:
        network: Links between nodes.
        within: Links inside a node.
        route: Ranks on two nodes or more.
        passes: 1 for a reduce-scatter or an all-gather, 2 for an all-reduce.
    """
    ranks, flows = route.ranks, route.fewest_per_node
    steps, load = passes * (ranks - 1), passes * (ranks - 1) / ranks
    flows = min(flows, network.flows_per_node or flows)
    limit = within.ring_bytes_per_s(route.most_per_node)
    return [
        Line("ring", network.kernel_s + steps * p.step_s, load / min(flows * p.bandwidth_bytes_per_s, limit))
        for p in network.protocols_among(route.nodes)
    ]


def flat_tree_lines(network: LinkCoefficients, within: LinkCoefficients, route: Route) -> list[Line]:
    """Lines of an all-reduce on a tree of nodes, with a tree of ranks in each, per byte of the whole tensor.

    One flow leaves a node, as the measured all-reduces of up to eight ranks per node show.
    """
    nodes, per_node = route.nodes, route.most_per_node
    steps_between, steps_inside = (2 * math.ceil(math.log2(n)) for n in (nodes, per_node))
    inside_s = steps_inside * min(p.step_s for p in within.protocols_among(per_node))
    load = 1.0 if nodes == 2 else 2.0  # two nodes exchange halves, of which each is the root of one
    limit = within.ring_bytes_per_s(per_node)
    return [
        Line(
            "tree",
            network.kernel_s + steps_between * p.step_s + inside_s,
            load / min(p.bandwidth_bytes_per_s, limit),
        )
        for p in network.protocols_among(nodes)
    ]


_FOLDER = files("muxtune.data") / "links"


def link_names() -> list[str]:
    """Links with coefficients, ``TOPOLOGY-DEVICE``."""
    return sorted(
        entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json")
    )


def load_link(link: str, device: str) -> LinkCoefficients:
    """Coefficients of a topology or network between devices of one kind.

    A device of one's own has those of its links in its folder, as ``nvlink-all.json``.

    Raises:
        UserError: The device has no such link here.
    """
    if has_part(device, link):
        return load_part(device, link, LinkCoefficients)
    name = f"{link}-{device}"
    if name not in link_names():
        raise UserError(
            f"no coefficients of {link} for device {device!r}; there are {', '.join(link_names())}, "
            "or a link of one's own in the cluster's file (name, latency_s, bandwidth_bytes_per_s)"
        )
    return LinkCoefficients.model_validate_json((_FOLDER / f"{name}.json").read_text())


AS_GIVEN = "latency and rate as given"
"""Basis of a link of one's own."""


def link_from_spec(spec: LinkSpec, device: str) -> LinkCoefficients:
    """A link of one's own: the textbook algorithms on one latency and one rate."""

    def protocol(algorithm: Algorithm) -> Protocol:
        return Protocol(
            algorithm=algorithm,
            step_s=spec.latency_s,
            bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s,
        )

    direct, many = protocol("direct"), (protocol("tree"), protocol("ring"))
    return LinkCoefficients(
        link=spec.name,
        device=device,
        kernel_s=0.0,
        send_recv=(direct,),
        all_reduce=(
            RankProtocols(ranks=2, protocols=(direct,)),
            RankProtocols(ranks=3, protocols=many),
        ),
        flows_per_node=1,
        basis=AS_GIVEN,
        fit=None,
    )
