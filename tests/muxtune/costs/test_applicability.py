"""A profile of other devices is refused for a cluster, and what is merely not the same is said."""

from dataclasses import replace

import pytest

from muxtune.cluster import TESTBEDS, ClusterSpec, DeviceSpec, LinkSpec, load_cluster
from muxtune.costs.applicability import check_profile
from muxtune.support.errors import SpecError
from muxtune.support.machine import usable_cores
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

PROFILE = make_profile(analytic_law(), operators())


def measured(**changes):
    return replace(PROFILE, provenance=PROFILE.provenance.model_copy(update=changes))


def gpus(name, ranks=2, nodes=1):
    link = LinkSpec(name="own", latency_s=1e-5, bandwidth_bytes_per_s=1e10)
    device = DeviceSpec(name=name, kind="cuda", memory_bytes=10**10)
    between = link if nodes > 1 else None
    return ClusterSpec(
        name="gpus", device=device, ranks=ranks, nodes=nodes, within_node=link, between_nodes=between
    )


def test_a_profile_of_this_machine_leaves_no_doubt():
    assert check_profile(PROFILE, load_cluster("cpu-2")) == ()


@pytest.mark.parametrize("cluster", TESTBEDS.values(), ids=str)
def test_a_profile_of_processors_prices_no_gpu(cluster):
    expected = rf"^p\.parquet: device = 'cpu': expected 'cuda': {cluster.name} has devices of the kind"
    with pytest.raises(SpecError, match=expected):
        check_profile(PROFILE, cluster, "p.parquet")


def test_a_profile_of_gpus_prices_no_processor():
    with pytest.raises(
        SpecError, match=r"^profile: device = 'cuda': expected 'cpu': cpu-2 has devices of the"
    ):
        check_profile(measured(device="cuda"), load_cluster("cpu-2"))


@pytest.mark.parametrize(
    ("processor", "device"),
    [
        ("NVIDIA A40", "a40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_gpu_is_known_by_its_name(processor, device):
    profile = measured(device="cuda", processor=processor)
    assert check_profile(profile, gpus(device)) == ()


@pytest.mark.parametrize(
    ("processor", "device"), [("NVIDIA H200", "a40"), ("NVIDIA RTX A4000", "a40"), ("NVIDIA A10", "a100")]
)
def test_another_gpu_is_refused(processor, device):
    with pytest.raises(
        SpecError, match=f"^profile: processor = '{processor}': expected an {device}, as gpus has"
    ):
        check_profile(measured(device="cuda", processor=processor), gpus(device))


def test_a_gpu_with_a_name_of_its_own_is_doubtful():
    (doubt,) = check_profile(measured(device="cuda", processor="NVIDIA H200"), gpus("the-fast-one"))
    assert doubt == "measured on NVIDIA H200, and nothing tells that the-fast-one is the same"


DOUBTS = [
    ({"processor": "Another Core i3"}, "cpu-2", "measured on Another Core i3, and this machine has "),
    ({"settings": {"cores": str(usable_cores() + 6)}}, "cpu-2", "measured where processes had "),
    ({}, "cpu-4", "measured with 2 ranks at a time, and cpu-4 has 4: what ranks take from each other"),
    ({"ranks": 1}, "cpu-2", "measured with 1 rank at a time, and cpu-2 has 2"),
    ({"threads": 8}, "cpu-2", "measured with 8 threads per rank, and a rank has 1"),
    ({"versions": {"torch": "1.13"}}, "cpu-2", "measured with torch 1.13, and here is torch "),
    (
        {"settings": {"kernels": "triton"}},
        "cpu-2",
        "measured with MUXTUNE_KERNELS=triton, and here it is auto",
    ),
]


@pytest.mark.parametrize(("changes", "cluster", "said"), DOUBTS, ids=lambda v: str(v)[:40])
def test_what_is_not_the_same_is_said(changes, cluster, said, monkeypatch):
    monkeypatch.delenv("MUXTUNE_KERNELS", raising=False)
    (doubt,) = check_profile(measured(**changes), load_cluster(cluster))
    assert doubt.startswith(said)


def test_a_cluster_of_other_processors_is_not_compared_with_this_machine():
    cluster = load_cluster("cpu-2")
    other = cluster.model_copy(update={"device": cluster.device.model_copy(update={"name": "graviton"})})
    assert check_profile(measured(processor="Neoverse V1"), other) == ()


def test_links_that_the_profile_cannot_know_are_said():
    several = gpus("h200", ranks=4, nodes=2)
    (doubt,) = check_profile(measured(device="cuda", processor="NVIDIA H200"), several)
    assert doubt == "messages and collectives between the 2 nodes are priced as those inside of one"
    slow = LinkSpec(name="serial-line", latency_s=1.0, bandwidth_bytes_per_s=1e3)
    cluster = load_cluster("cpu-2").model_copy(update={"within_node": slow})
    (doubt,) = check_profile(PROFILE, cluster)
    assert doubt == "messages are priced as they were measured over loopback, not over the link serial-line"
