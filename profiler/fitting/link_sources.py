"""What each shipped link is fitted to, and what its data sheet promises."""

from __future__ import annotations

from typing import NamedTuple


class Series(NamedTuple):
    """One sweep over sizes in the table."""

    collective: str
    """``all_reduce`` or ``send_recv``."""
    ranks: int
    per_node: int


class LinkSource(NamedTuple):
    """Rows of one link between devices of one kind."""

    link: str
    device: str
    topology: str
    """Topology in the table."""
    series: tuple[Series, ...]
    datasheet_bytes_per_s: float
    """Rate of the data sheet, in one direction."""
    datasheet: str
    """Source of that rate."""
    flows_per_node: int | None = None
    """Flows per node of a network, where no row tells them."""
    across: tuple[Series, ...] = ()
    """All-reduces of several ranks per node on a network, which tell ``flows_per_node``."""
    inside: str | None = None
    """Link inside the nodes of those."""
    stand_in: str | None = None
    """Link whose latencies and share of the data-sheet rate are taken if no row is left."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.link}-{self.device}"


PCIE_4 = "PCI Express 4.0, 16 lanes of 16 GT/s, 128b/130b"
PCIE_5 = "PCI Express 5.0, 16 lanes of 32 GT/s, 128b/130b"
PCIE_4_BYTES_PER_S = 16 * 16e9 * 128 / 130 / 8
PCIE_5_BYTES_PER_S = 2 * PCIE_4_BYTES_PER_S

_SEND_2 = Series("send_recv", 2, 2)
_SEND_NODES = Series("send_recv", 2, 1)
_REDUCE = tuple(Series("all_reduce", n, n) for n in (2, 4, 8))

SOURCES = {
    source.name: source
    for source in (
        LinkSource(
            "nvlink-all",
            "a100",
            "a100_dgx",
            (_SEND_2, *_REDUCE),
            300e9,
            "NVIDIA A100 Tensor Core GPU, data sheet: NVLink 600 GB/s, both directions",
        ),
        LinkSource(
            "nvlink-all",
            "h100",
            "h100_dgx",
            (_SEND_2, *_REDUCE),
            450e9,
            "NVIDIA H100 Tensor Core GPU, data sheet: NVLink 900 GB/s, both directions",
        ),
        LinkSource(
            "nvlink-pair",
            "a100",
            "a100_pairwise_nvlink",
            (_SEND_2, _REDUCE[0]),
            300e9,
            "NVIDIA A100 Tensor Core GPU, data sheet: NVLink bridge for 2 GPUs 600 GB/s, both directions",
        ),
        LinkSource(
            "nvlink-pair",
            "h100",
            "h100_pairwise_nvlink",
            (_SEND_2, _REDUCE[0]),
            300e9,
            "NVIDIA H100 Tensor Core GPU, data sheet of the PCIe card: NVLink 600 GB/s, both directions",
        ),
        LinkSource(
            "nvlink-pair",
            "a40",
            "a40_pairwise_nvlink",
            (_SEND_2,),
            56.25e9,
            "NVIDIA A40, data sheet: NVLink 112.5 GB/s, both directions",
            stand_in="nvlink-pair-a100",
        ),
        LinkSource("pcie", "a100", "a100_pairwise_nvlink", (_REDUCE[1],), PCIE_4_BYTES_PER_S, PCIE_4),
        LinkSource("pcie", "h100", "h100_pairwise_nvlink", (_REDUCE[1],), PCIE_5_BYTES_PER_S, PCIE_5),
        LinkSource(
            "pcie",
            "a40",
            "a40_pairwise_nvlink",
            (_SEND_2,),
            PCIE_4_BYTES_PER_S,
            PCIE_4,
            stand_in="pcie-a100",
        ),
        LinkSource(
            "infiniband",
            "a100",
            "a100_dgx",
            (_SEND_NODES, Series("all_reduce", 2, 1)),
            12.5e9,
            "a port of 100 Gb/s (EDR), the least that carries the measured 7.8 GB/s",
            across=(Series("all_reduce", 4, 2), Series("all_reduce", 8, 4), Series("all_reduce", 16, 8)),
            inside="nvlink-all-a100",
        ),
        LinkSource(
            "infiniband",
            "h100",
            "h100_dgx",
            (_SEND_NODES,),
            50e9,
            "NVIDIA DGX H100, data sheet: 8 ConnectX-7 ports of 400 Gb/s (NDR)",
            flows_per_node=8,
        ),
        LinkSource(
            "infiniband",
            "a40",
            "a40_pairwise_nvlink",
            (_SEND_NODES,),
            25e9,
            "one port of 200 Gb/s (HDR) per node of two GPUs, assumed: the paper does not say",
            flows_per_node=1,
            stand_in="infiniband-h100",
        ),
    )
}
"""Sources by name of the link; :mod:`profiler.fitting.collectives` tells what the topologies' rows show."""
