"""Whether a profile says something about a cluster: refused where it cannot, doubted where it may not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from muxtune.cluster import LOOPBACK, ClusterSpec
from muxtune.costs.devices import device_names
from muxtune.costs.profile import Profile
from muxtune.support.errors import SpecError
from muxtune.support.machine import package_version, processor_name, usable_cores

KERNELS_VARIABLE = "MUXTUNE_KERNELS"
"""Environment variable that says which kernels operators run in; a profile has its value as setting
``kernels``."""

DEFAULT_KERNELS = "auto"

_PACKAGES = ("torch", "muxtune", "numpy")
"""Packages whose versions change how long an operator takes."""


def check_profile(profile: Profile, cluster: ClusterSpec, where: str = "profile") -> tuple[str, ...]:
    """Refuse a profile of other devices than the cluster's, and say what else is not as in the cluster.

    The versions and, for processors, the machine are compared with those here: a plan usually runs where it
    is made.

    Args:
        profile: What plans will be priced with.
        cluster: Where they will run.
        where: File or object in front of the field's name.

    Returns:
        Doubts, as sentences; none where everything is as it was measured.

    Raises:
        SpecError: Names the field of the profile, its value and what was expected.
    """
    measured, device = profile.provenance, cluster.device
    if measured.device != device.kind:
        expected = f"{device.kind!r}: {cluster.name} has devices of the kind {device.name}"
        raise SpecError(f"{where}: device", measured.device, expected)
    known = device.name in device_names()
    if device.kind == "cuda" and known and not _names(measured.processor, device.name):
        raise SpecError(f"{where}: processor", measured.processor, f"an {device.name}, as {cluster.name} has")
    return tuple(_doubts(profile, cluster))


def _doubts(profile: Profile, cluster: ClusterSpec) -> Iterator[str]:
    measured, device = profile.provenance, cluster.device
    if device.kind == "cuda" and not _names(measured.processor, device.name):
        yield f"measured on {measured.processor}, and nothing tells that {device.name} is the same"
    if device.kind == "cpu" and device.name == "cpu":
        if measured.processor != processor_name():
            yield f"measured on {measured.processor}, and this machine has {processor_name() or 'another'}"
        cores = measured.settings.get("cores")
        if cores is not None and cores != str(usable_cores()):
            yield f"measured where processes had {cores} cores, and here they have {usable_cores()}"
    if device.kind == "cpu" and measured.ranks != cluster.ranks:
        yield (
            f"measured with {_ranks(measured.ranks)} at a time, and {cluster.name} has {cluster.ranks}: what "
            "ranks take from each other's caches and memory is another"
        )
    if device.kind == "cpu" and measured.threads != 1:
        yield f"measured with {measured.threads} threads per rank, and a rank has 1"
    here = {package: package_version(package) for package in _PACKAGES}
    other = [
        name for name in _PACKAGES if name in measured.versions and measured.versions[name] != here[name]
    ]
    if other:
        then = ", ".join(f"{name} {measured.versions[name]}" for name in other)
        now = ", ".join(f"{name} {here[name]}" for name in other)
        yield f"measured with {then}, and here is {now}"
    kernels = os.environ.get(KERNELS_VARIABLE, DEFAULT_KERNELS)
    if measured.settings.get("kernels", kernels) != kernels:
        yield f"measured with {KERNELS_VARIABLE}={measured.settings['kernels']}, and here it is {kernels}"
    if cluster.nodes > 1:
        yield f"messages and collectives between the {cluster.nodes} nodes are priced as those inside of one"
    elif device.kind == "cpu" and cluster.ranks > 1 and cluster.within_node != LOOPBACK:
        yield f"messages are priced as they were measured over loopback, not over the link {cluster.links}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _names(processor: str, device: str) -> bool:
    """Whether ``NVIDIA A100-SXM4-80GB`` is an ``a100``."""
    return device.lower() in re.split(r"[^a-z0-9]+", processor.lower())
