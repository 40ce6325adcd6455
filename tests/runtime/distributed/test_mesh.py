"""Where each rank of a mesh stands."""

from __future__ import annotations

import multiprocessing
import os
import signal
from datetime import timedelta
from itertools import product
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from muxtune.placement import Placement
from muxtune.plan import Parallelism
from runtime.device.devices import Cpu
from runtime.distributed import mesh
from runtime.distributed.mesh import RankMesh
from runtime.distributed.peers import PeerLostError
from tests.integration.processes import wait_until

MESH = Parallelism(tp=2, pp=3, dp=2, layers_per_stage=(1, 1, 1))


def test_shards_are_neighbours_then_stages_then_replicas():
    places = [RankMesh(MESH, rank) for rank in range(MESH.ranks)]
    assert [(p.replica, p.stage, p.shard.index) for p in places] == [
        (replica, stage, shard) for replica in range(2) for stage in range(3) for shard in range(2)
    ]
    assert [rank for rank, place in enumerate(places) if place.reports] == [0, 2, 4]  # one per stage
    assert [rank for rank, place in enumerate(places) if place.first] == [0, 1, 6, 7]
    assert [rank for rank, place in enumerate(places) if place.last] == [4, 5, 10, 11]


def test_torch_numbers_ranks_as_the_placement_does():
    """Process groups are made from the dimensions of a mesh that torch fills in this order."""
    placement = Placement(MESH.tp, MESH.pp, MESH.dp, devices_per_node=4)
    ranks = torch.arange(MESH.ranks).view(MESH.dp, MESH.pp, MESH.tp)
    for stage, shard in product(range(MESH.pp), range(MESH.tp)):
        assert placement.replica_group(stage, shard) == tuple(ranks[:, stage, shard].tolist())
    for replica, stage in product(range(MESH.dp), range(MESH.pp)):
        assert placement.shard_group(replica, stage) == tuple(ranks[replica, stage].tolist())


@pytest.mark.parametrize("rank", range(MESH.ranks))
def test_messages_stay_in_the_replica_and_shard(rank):
    own = RankMesh(MESH, rank)
    for stage in range(3):
        other = RankMesh(MESH, own.neighbour(stage))
        assert (other.replica, other.stage, other.shard.index) == (own.replica, stage, own.shard.index)
    assert own.neighbour(own.stage) == rank


class LikeGpu(Cpu):
    """Gloo, but with groups like those that NCCL needs."""

    own_groups = True


def _build(rank: int, folder: str, device: Cpu, dies: bool, results: Queue) -> None:
    """Be one of two ranks, each a stage on a GPU, or a shard."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if Path("/sys/class/net/lo").exists() else "lo0"
    mesh.BUILD_TIMEOUT_S = 2.0 if dies else 60.0
    peer_timeout = timedelta(seconds=1800)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=peer_timeout)
    if dies and rank == 1:
        wait_until(Path(folder, "met").exists, 60)
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, "met").touch()
    shape = {"tp": 1, "pp": 2} if device.own_groups else {"tp": 2, "pp": 1}
    layers = (1,) * shape["pp"]
    try:
        built = RankMesh(Parallelism(**shape, dp=1, layers_per_stage=layers), rank, 1800.0, device)
    except PeerLostError as error:
        results.put(("lost", str(error)))
        return
    if device.own_groups:
        groups = [built.stages.group, *(built.link(direction, 1 - built.stage).group for direction in "FB")]
    else:
        groups = [built.team._team.group]
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    results.put((len(groups), timeouts | {_get_default_store().timeout}))
    dist.barrier()  # the other one may still connect to this one


def _results(tmp_path: Path, device: Cpu, count: int, *, dies: bool) -> list:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_build, args=(rank, str(tmp_path), device, dies, results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        return [results.get(timeout=90) for _ in range(count)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize("device", [Cpu(), LikeGpu()], ids=["shards", "stages with own groups"])
def test_a_rank_that_dies_while_groups_are_built_is_not_waited_for_as_long_as_a_message(device, tmp_path):
    ((kind, text),) = _results(tmp_path, device, 1, dies=True)
    assert kind == "lost"
    assert text.startswith("another rank did not answer")


@pytest.mark.parametrize(
    ("device", "groups"), [(Cpu(), 1), (LikeGpu(), 3)], ids=["shards", "stages with own groups"]
)
def test_what_has_been_built_waits_as_long_as_for_a_message(device, groups, tmp_path):
    assert _results(tmp_path, device, 2, dies=False) == [(groups, {timedelta(seconds=1800)})] * 2
