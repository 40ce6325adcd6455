"""The machine: devices, how many, and the links inside a node and between nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from muxtune.support.errors import SpecError, UserError, spec_error_from
from muxtune.support.machine import memory_limit_bytes, usable_cores
from muxtune.support.strict_models import StrictModel
from muxtune.support.yaml_file import load_yaml

DeviceKind = Literal["cpu", "cuda"]


MOST_NAME_CHARACTERS = 128
MOST_RANKS = 100_000
"""Ranks that a cluster may have, at most."""


class DeviceSpec(StrictModel):
    """One rank's device. A name with shipped coefficients (``a40``, ``a100``, ``h100``) is priced by them."""

    name: str = Field(max_length=MOST_NAME_CHARACTERS)
    """Name of the device."""
    kind: DeviceKind
    """What torch calls it."""
    memory_bytes: int = Field(gt=0, lt=2**63)
    """What a rank may fill."""
    reserved_bytes: int = Field(default=0, ge=0)
    """Further bytes of the device, left to the interpreter, libraries and drivers."""


class LinkSpec(StrictModel):
    """A link of one's own, where no shipped coefficients are wanted: ``latency_s`` + n / bandwidth."""

    name: str = Field(max_length=MOST_NAME_CHARACTERS)
    """Name of the link."""
    latency_s: float = Field(ge=0, le=1000)
    """Latency of one message, and of each step of a collective."""
    bandwidth_bytes_per_s: float = Field(gt=0, ge=1, le=1e18)
    """Achieved rate of large messages in one direction, not the data-sheet rate."""


Topology = Literal["nvlink-all", "nvlink-pair", "pcie", "loopback-gloo"]
"""Links inside a node.

nvlink-all    NVSwitch: every GPU reaches every other one over NVLink
nvlink-pair   NVLink bridges join ranks 0 and 1, 2 and 3, ...; PCIe joins the pairs
pcie          PCIe only
loopback-gloo processes of one machine, gloo over TCP
"""

LOOPBACK: Topology = "loopback-gloo"

Network = Literal["infiniband"]
"""Links between nodes."""


def _known(names: tuple[str, ...]) -> BeforeValidator:
    """What is no link of one's own must be one of these names; the message then names the field alone."""

    def check(value: object) -> object:
        if isinstance(value, dict | LinkSpec) or value in names:
            return value
        raise ValueError(f"{', '.join(names)}, or a link with name, latency_s and bandwidth_bytes_per_s")

    return BeforeValidator(check)


def _sort_of_link(value: object) -> str:
    return "topology" if isinstance(value, str) else "link"


_OwnLink = Annotated[LinkSpec, Tag("link")]
WithinNode = Annotated[
    Annotated[Topology, Tag("topology")] | _OwnLink,
    Discriminator(_sort_of_link),
    _known(get_args(Topology)),
]
BetweenNodes = Annotated[
    Annotated[Network, Tag("topology")] | _OwnLink,
    Discriminator(_sort_of_link),
    _known(get_args(Network)),
]


class ClusterSpec(StrictModel):
    """Equal nodes of equal devices. Ranks are numbered through the nodes, so neighbours share a node."""

    name: str = Field(max_length=MOST_NAME_CHARACTERS)
    """Name of the cluster, a label."""
    device: DeviceSpec
    """Device of every rank."""
    ranks: int = Field(gt=0, le=MOST_RANKS)
    """Devices of all nodes."""
    nodes: int = Field(default=1, gt=0)
    """Equal nodes that the devices are in."""
    within_node: WithinNode
    """Links inside a node: a topology, or a link of one's own."""
    between_nodes: BetweenNodes | None = Field(default=None, validate_default=True)
    """Links between nodes; null where there is one node."""

    @field_validator("nodes")
    @classmethod
    def _share_ranks_equally(cls, nodes: int, info: ValidationInfo) -> int:
        ranks = info.data.get("ranks", nodes)
        if ranks % nodes:
            raise ValueError(f"a divisor of the {ranks} ranks")
        return nodes

    @field_validator("between_nodes")
    @classmethod
    def _exactly_with_several_nodes(cls, link: object, info: ValidationInfo) -> object:
        nodes = info.data.get("nodes")
        if nodes is not None and (nodes > 1) != (link is not None):
            raise ValueError(
                "no link, as there is one node" if nodes == 1 else f"a link between the {nodes} nodes"
            )
        return link

    @property
    def devices_per_node(self) -> int:
        """Devices of a node, equally many on each."""
        return self.ranks // self.nodes

    @property
    def links(self) -> str:
        """Names of the links, as in ``nvlink-pair, infiniband``."""
        names = [_link_name(self.within_node)] if self.devices_per_node > 1 else []
        if self.between_nodes is not None:
            names.append(_link_name(self.between_nodes))
        return ", ".join(names) or "none"


def _link_name(link: str | LinkSpec) -> str:
    return link if isinstance(link, str) else link.name


_MIB = 2**20

GPU_RESERVE_BYTES = 1024 * _MIB
"""Memory left free on each GPU for what torch's allocator does not own: CUDA context and kernels (about 0.5
GiB with torch), NCCL's buffers. What the allocator itself wastes is in the memory model."""


def _gpu(name: str, total_mib: int) -> DeviceSpec:
    memory_bytes = total_mib * _MIB - GPU_RESERVE_BYTES
    return DeviceSpec(name=name, kind="cuda", memory_bytes=memory_bytes, reserved_bytes=GPU_RESERVE_BYTES)


GPUS = {gpu.name: gpu for gpu in (_gpu("a40", 46_068), _gpu("a100", 81_920), _gpu("h100", 81_559))}
"""A40-48GB, A100-80GB and H100-80GB, with the total that nvidia-smi reports (the A40's with ECC on)."""

PROCESS_RESERVE_BYTES = 576 * _MIB
"""Memory of a CPU left to each process beside what the memory model counts. Ranks of llama-tiny (torch 2.13,
no CUDA) had 467 MiB resident before they loaded anything (``process_start_bytes`` of a run), and at their
peak 513 and 522 MiB beside the model's bytes: Python, torch, transformers, gloo's buffers; here with a tenth
on top."""

MAX_CPU_RANKS = 64
GPUS_PER_NODE = 8
"""GPUs on each of the A100 nodes."""


def _testbeds() -> dict[str, ClusterSpec]:
    """The three testbeds of the paper (arXiv 2603.02885).

    The A40 has a bridge to one neighbour and no NVSwitch, so "NVLink" among its four GPUs means two pairs.
    """
    a = ClusterSpec(name="testbed-a", device=GPUS["a40"], ranks=4, within_node="nvlink-pair")
    b = ClusterSpec(
        name="testbed-b",
        device=GPUS["a40"],
        ranks=16,
        nodes=8,
        within_node="nvlink-pair",
        between_nodes="infiniband",
    )
    c = ClusterSpec(name="testbed-c", device=GPUS["h100"], ranks=8, within_node="nvlink-all")
    return {cluster.name: cluster for cluster in (a, b, c)}


TESTBEDS = _testbeds()


def cluster_names() -> list[str]:
    """Names for :func:`load_cluster`: a few of ``a100-N``, and ``cpu-N`` as far as cores and memory go."""
    most = min(usable_cores(), MAX_CPU_RANKS)
    cpus = [f"cpu-{n}" for n in range(1, most + 1) if ranks_memory_bytes(n) > 0]
    return [*TESTBEDS, *(f"a100-{n}" for n in (1, 2, 4, 8, 16)), *cpus]


def load_cluster(name_or_path: str) -> ClusterSpec:
    """A preset or a YAML file with the fields of :class:`ClusterSpec`.

    Presets are ``testbed-a``, ``-b`` and ``-c``, ``a100-N`` (N of a node's eight, or whole nodes) and
    ``cpu-N`` (N one-thread ranks of this machine, with an equal share of the memory that it lends, see
    :func:`ranks_memory_bytes`).

    Raises:
        UserError: Unknown name, unreadable file or a wrong field.
    """
    if name_or_path in TESTBEDS:
        return TESTBEDS[name_or_path]
    match = re.fullmatch(r"(cpu|a100)-([1-9]\d{0,8})", name_or_path)
    if match:
        series = {"cpu": _cpu_cluster, "a100": _a100_cluster}[match[1]]
        return series(name_or_path, int(match[2]))
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        known = ", ".join([*TESTBEDS, "a100-N", "cpu-N"])
        raise UserError(f"no cluster named {name_or_path!r}; expected {known} or a path to a YAML file")
    content = load_yaml(path, "the cluster")
    try:
        return ClusterSpec.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error


def ranks_memory_bytes(ranks: int) -> int:
    """What ``ranks`` processes on this machine may fill together with what the memory model counts.

    Control groups limit it (:func:`muxtune.support.machine.memory_limit_bytes`), and every rank, and the
    process that starts them, has its interpreter and libraries in it. 0 or less where there is no room for
    that many.
    """
    return memory_limit_bytes() - (ranks + 1) * PROCESS_RESERVE_BYTES


def _a100_cluster(name: str, ranks: int) -> ClusterSpec:
    if ranks > MOST_RANKS:
        raise SpecError("cluster", name, f"at most {MOST_RANKS:,} GPUs")
    nodes = -(-ranks // GPUS_PER_NODE)
    if nodes > 1 and ranks % GPUS_PER_NODE:
        expected = f"1 to {GPUS_PER_NODE} GPUs or a multiple of {GPUS_PER_NODE}"
        raise SpecError("cluster", name, expected)
    return ClusterSpec(
        name=name,
        device=GPUS["a100"],
        ranks=ranks,
        nodes=nodes,
        within_node="nvlink-all",
        between_nodes="infiniband" if nodes > 1 else None,
    )


def _cpu_cluster(name: str, ranks: int) -> ClusterSpec:
    if ranks > MAX_CPU_RANKS:
        raise SpecError("cluster", name, f"at most cpu-{MAX_CPU_RANKS}")
    memory_bytes, total = ranks_memory_bytes(ranks) // ranks, memory_limit_bytes()
    if memory_bytes <= 0:
        expected = (
            f"fewer ranks: before they load anything, the processes of {ranks} take "
            f"{total - ranks_memory_bytes(ranks)} bytes, and there are {total}"
        )
        raise SpecError("cluster", name, expected)
    reserved_bytes = total // ranks - memory_bytes
    device = DeviceSpec(name="cpu", kind="cpu", memory_bytes=memory_bytes, reserved_bytes=reserved_bytes)
    return ClusterSpec(name=name, device=device, ranks=ranks, within_node=LOOPBACK)
