"""Clusters: this machine by name, any other by file."""

import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from muxtune.cluster import MAX_CPU_RANKS, ClusterSpec, LinkSpec, cluster_names, load_cluster
from muxtune.errors import UserError

CONTENT = {
    "name": "two-boxes",
    "device": {"name": "a40", "kind": "cuda", "memory_bytes": 48_000_000_000},
    "ranks": 2,
    "link": {"name": "pcie", "latency_s": 1.0e-5, "bandwidth_bytes_per_s": 2.0e10},
}


@pytest.mark.parametrize("ranks", [1, 2, 7, MAX_CPU_RANKS])
def test_cpu_n_is_this_machine_split_evenly(ranks):
    cluster = load_cluster(f"cpu-{ranks}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (cluster.name, cluster.ranks, cluster.device.kind) == (f"cpu-{ranks}", ranks, "cpu")
    assert total - ranks < cluster.device.memory_bytes * ranks <= total


def test_every_listed_name_can_be_loaded():
    assert [load_cluster(name).name for name in cluster_names()] == cluster_names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu-65", "cluster = 'cpu-65': expected at most cpu-64"),
        ("cpu-0", "no cluster named 'cpu-0'; expected cpu-N or a path to a YAML file"),
        ("cpu-01", "no cluster named 'cpu-01'"),
        ("cpu-", "no cluster named 'cpu-'"),
        ("xcpu-2", "no cluster named 'xcpu-2'"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks = 0: expected greater than 0"),
        ({"nodes": 2}, "nodes = 2: expected no such field"),
        ({"device": {**CONTENT["device"], "kind": "tpu"}}, "device.kind = 'tpu': expected 'cpu' or 'cuda'"),
        ({"device": {**CONTENT["device"], "memory_bytes": 0}}, "device.memory_bytes = 0"),
        ({"link": {**CONTENT["link"], "latency_s": -1}}, "link.latency_s = -1"),
        ({"link": {**CONTENT["link"], "bandwidth_bytes_per_s": 0}}, "link.bandwidth_bytes_per_s = 0"),
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


@given(st.floats(0, 1), st.floats(1, 1e12), st.integers(0, 10**12))
def test_a_transfer_takes_latency_plus_size_over_rate(latency_s, rate, size):
    link = LinkSpec(name="l", latency_s=latency_s, bandwidth_bytes_per_s=rate)
    assert link.transfer_s(size) == pytest.approx(latency_s + size / rate, rel=1e-12)
    assert link.transfer_s(0) == latency_s
