"""Clusters: the paper's testbeds, A100 nodes and this machine by name, any other by file."""

import pytest
import yaml

from muxtune.cluster import (
    GPU_RESERVE_BYTES,
    GPUS,
    MAX_CPU_RANKS,
    PROCESS_RESERVE_BYTES,
    ClusterSpec,
    LinkSpec,
    cluster_names,
    load_cluster,
)
from muxtune.support.errors import UserError

CONTENT = {
    "name": "two-boxes",
    "device": {"name": "a40", "kind": "cuda", "memory_bytes": 48_000_000_000, "reserved_bytes": 0},
    "ranks": 4,
    "nodes": 2,
    "within_node": "nvlink-pair",
    "between_nodes": {"name": "ethernet", "latency_s": 3.0e-5, "bandwidth_bytes_per_s": 1.1e9},
}


@pytest.mark.parametrize("ranks", [1, 2, 7, MAX_CPU_RANKS])
def test_cpu_n_is_this_machine_split_evenly(ranks, monkeypatch):
    total = 64 * 2**30
    monkeypatch.setattr("muxtune.cluster.memory_limit_bytes", lambda: total)
    cluster = load_cluster(f"cpu-{ranks}")
    device = cluster.device
    assert (cluster.name, cluster.ranks, device.kind) == (f"cpu-{ranks}", ranks, "cpu")
    assert total - ranks < (device.memory_bytes + device.reserved_bytes) * ranks <= total
    # Every rank's process and the one that starts them, shared out.
    processes_bytes = (ranks + 1) * PROCESS_RESERVE_BYTES
    assert processes_bytes - ranks < device.reserved_bytes * ranks < processes_bytes + ranks
    assert (cluster.nodes, cluster.within_node, cluster.between_nodes) == (1, "loopback-gloo", None)


def test_a_small_container_has_fewer_clusters(monkeypatch):
    monkeypatch.setattr("muxtune.cluster.memory_limit_bytes", lambda: 4 * PROCESS_RESERVE_BYTES)
    monkeypatch.setattr("muxtune.cluster.usable_cores", lambda: 96)
    assert [name for name in cluster_names() if name.startswith("cpu")] == ["cpu-1", "cpu-2"]
    assert load_cluster("cpu-1").device.memory_bytes == 2 * PROCESS_RESERVE_BYTES
    with pytest.raises(
        UserError, match=r"cluster = 'cpu-3': expected fewer ranks: before they load anything"
    ):
        load_cluster("cpu-3")


@pytest.mark.parametrize(
    ("name", "device", "nodes", "per_node", "links"),
    [
        ("testbed-a", "a40", 1, 4, "nvlink-pair"),
        ("testbed-b", "a40", 8, 2, "nvlink-pair, infiniband"),
        ("testbed-c", "h100", 1, 8, "nvlink-all"),
        ("a100-1", "a100", 1, 1, "none"),
        ("a100-3", "a100", 1, 3, "nvlink-all"),
        ("a100-8", "a100", 1, 8, "nvlink-all"),
        ("a100-32", "a100", 4, 8, "nvlink-all, infiniband"),
    ],
)
def test_presets_are_the_testbeds_of_the_paper_and_a100_nodes(name, device, nodes, per_node, links):
    cluster = load_cluster(name)
    assert (cluster.name, cluster.device.name) == (name, device)
    assert (cluster.nodes, cluster.devices_per_node, cluster.ranks) == (nodes, per_node, nodes * per_node)
    assert cluster.links == links


@pytest.mark.parametrize(("name", "gib"), [("a40", 45), ("a100", 80), ("h100", 80)])
def test_a_gpu_lends_its_memory_but_for_the_reserve(name, gib):
    whole_bytes = GPUS[name].memory_bytes + GPU_RESERVE_BYTES
    assert whole_bytes / 2**30 == pytest.approx(gib, rel=0.01)  # the A40's ECC takes 3 of its 48
    assert GPUS[name].memory_bytes < whole_bytes - 0.5 * 2**30  # a CUDA context alone takes that much
    assert GPUS[name].reserved_bytes == GPU_RESERVE_BYTES


def test_every_listed_name_can_be_loaded():
    assert [load_cluster(name).name for name in cluster_names()] == cluster_names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu-65", "cluster = 'cpu-65': expected at most cpu-64"),
        ("a100-12", "cluster = 'a100-12': expected 1 to 8 GPUs or a multiple of 8"),
        (
            "cpu-0",
            "no cluster named 'cpu-0'; expected testbed-a, testbed-b, testbed-c, a100-N, cpu-N or a path to",
        ),
        ("cpu-01", "no cluster named 'cpu-01'"),
        ("cpu-", "no cluster named 'cpu-'"),
        ("xcpu-2", "no cluster named 'xcpu-2'"),
        ("testbed-d", "no cluster named 'testbed-d'"),
        ("missing.yaml", "cannot read the cluster missing.yaml: No such file"),
    ],
)
def test_an_unknown_cluster_is_refused(name, message):
    with pytest.raises(UserError) as caught:
        load_cluster(name)
    assert str(caught.value).startswith(message)


def test_a_file_round_trips(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    cluster = load_cluster(str(path))
    assert cluster == ClusterSpec.model_validate(CONTENT)
    assert cluster.model_dump() == CONTENT
    assert cluster.between_nodes == LinkSpec(name="ethernet", latency_s=3.0e-5, bandwidth_bytes_per_s=1.1e9)
    assert cluster.links == "nvlink-pair, ethernet"


@pytest.mark.parametrize("name", ["testbed-b", "a100-4", "cpu-2"])
def test_presets_round_trip_through_json(name):
    cluster = load_cluster(name)
    assert ClusterSpec.model_validate_json(cluster.model_dump_json()) == cluster


LINK = CONTENT["between_nodes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks = 0: expected greater than 0"),
        ({"ranks": 5}, "nodes = 2: expected a divisor of the 5 ranks"),
        ({"link": LINK}, "link = {'bandwidth_bytes_per_s'"),
        ({"device": {**CONTENT["device"], "kind": "tpu"}}, "device.kind = 'tpu': expected 'cpu' or 'cuda'"),
        ({"device": {**CONTENT["device"], "memory_bytes": 0}}, "device.memory_bytes = 0"),
        ({"within_node": "nvlink"}, "within_node = 'nvlink': expected nvlink-all, nvlink-pair, pcie, "),
        ({"within_node": None}, "within_node = None: expected nvlink-all, nvlink-pair, pcie, "),
        ({"between_nodes": "nvlink-all"}, "between_nodes = 'nvlink-all': expected infiniband, or a link"),
        ({"between_nodes": None}, "between_nodes = None: expected a link between the 2 nodes"),
        ({"nodes": 1}, "between_nodes = {'bandwidth_bytes_per_s'"),
        ({"between_nodes": {**LINK, "latency_s": -1}}, "between_nodes.link.latency_s = -1"),
        (
            {"between_nodes": {**LINK, "bandwidth_bytes_per_s": 0}},
            "between_nodes.link.bandwidth_bytes_per_s = 0",
        ),
        ({"between_nodes": {**LINK, "rate": 1}}, "between_nodes.link.rate = 1: expected no such field"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_wrong_field_is_named_with_file_value_and_expectation(tmp_path, change, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(CONTENT | change))
    with pytest.raises(UserError) as caught:
        load_cluster(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"a: [", b"\xff\xfe\x00"], ids=["empty", "list", "cut", "binary"]
)
def test_a_file_that_is_no_cluster_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_cluster(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
