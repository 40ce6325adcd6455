"""Refusing and failing as one rank of torchrun's job; several ranks: integration/test_launch.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muxtune.support.errors import RunError, SpecError, UserError
from runtime.distributed.agreement import all_gather, barrier, refuse_together
from runtime.distributed.peers import PeerLostError, or_peer_lost
from runtime.launch import torchrun
from runtime.launch.torchrun import check_node_place, job_place, joined


def _refuse() -> None:
    raise SpecError("steps", 6, "1 to 5")


def test_a_rank_alone_agrees_with_itself():
    assert refuse_together(lambda: 3) == 3
    assert all_gather("a") == ["a"]
    with pytest.raises(SpecError, match="steps = 6"):
        refuse_together(_refuse)


@pytest.mark.parametrize(
    ("error", "kind"), [(SpecError("steps", 6, "1 to 5"), UserError), (RunError("x"), RunError)]
)
def test_an_error_names_the_rank_and_stays_of_its_kind(error, kind):
    with pytest.raises(kind, match=f"^rank 3: {error}$"), joined(3, 1, 60):
        raise error


def test_a_lost_peer_is_told_to_torchrun_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchrun, "END_WAIT_S", 0.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(PeerLostError), joined(0, 1, 60):
        raise PeerLostError("the connection to rank 1 broke:\nclosed")
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"] == "rank 0 ended: the connection to rank 1 broke: closed"


def test_a_lost_peer_is_an_error_where_no_torchrun_listens(monkeypatch):
    monkeypatch.setattr(torchrun, "END_WAIT_S", 0.0)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with (
        pytest.raises(RunError, match=r"^rank 0: the connection to rank 1 broke$") as caught,
        joined(0, 1, 60),
    ):
        raise PeerLostError("the connection to rank 1 broke")
    assert not isinstance(caught.value, PeerLostError)


def test_an_error_of_torch_names_the_rank():
    with (
        pytest.raises(RunError, match=r"^rank 3: OutOfMemoryError: CUDA out of memory$"),
        joined(3, 1, 60),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


PLACE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def place(monkeypatch):
    def set_place(**changes: str | None) -> None:
        for name, value in (PLACE | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_place


def test_torchrun_says_which_rank_this_is(place):
    place()
    assert job_place() == (5, 8)
    check_node_place()
    place(RANK="0", WORLD_SIZE="1", MASTER_PORT=None)
    assert job_place() == (0, 1)  # alone, and meets nobody


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, r"^RANK = '8': expected the number of this rank, 0 to 7; torchrun sets it"),
        ({"RANK": "five"}, r"^RANK = 'five': expected the number of this rank"),
        ({"WORLD_SIZE": ""}, r"^WORLD_SIZE = '': expected the number of ranks"),
        ({"MASTER_PORT": None}, r"^MASTER_PORT = None: expected a free port"),
        ({"LOCAL_RANK": None}, r"^LOCAL_RANK = None: expected this rank's number on its machine, 0 to 3"),
        ({"LOCAL_RANK": "4"}, r"^LOCAL_RANK = '4': expected this rank's number on its machine, 0 to 3"),
        ({"LOCAL_WORLD_SIZE": None}, r"^LOCAL_WORLD_SIZE = None: expected the number of ranks on this mach"),
    ],
    ids=str,
)
def test_a_launcher_that_does_not_say_all_is_refused_in_a_line(changes, message, place):
    place(**changes)
    with pytest.raises(SpecError, match=message):
        (job_place(), check_node_place())


CHAIN = 5


def _link(rank: int, port: int, told: Queue) -> None:
    """Wait for the rank before; the first one dies. None is ended by a torchrun, or ends by itself."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(CHAIN), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if Path("/sys/class/net/lo").exists() else "lo0"
    torchrun.END_WAIT_S = 600.0
    with joined(rank, CHAIN, 1800.0):
        barrier()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        work = dist.irecv(torch.zeros(4), rank - 1)
        try:
            or_peer_lost(work.wait, rank - 1)
        except PeerLostError:
            told.put(rank)
            raise


def test_in_a_chain_of_nodes_all_learn_of_a_death_before_any_has_ended():
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    told = context.Queue()
    ranks = [context.Process(target=_link, args=(rank, port, told)) for rank in range(CHAIN)]
    for process in ranks:
        process.start()
    try:
        assert sorted(told.get(timeout=60) for _ in range(CHAIN - 1)) == list(range(1, CHAIN))
        time.sleep(0.5)  # whatever the closed connections may do to them
        assert [process.exitcode for process in ranks] == [-signal.SIGKILL] + [None] * (CHAIN - 1)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _listening(port: int | None = None) -> set[str]:
    """Addresses that this process listens on, in the kernel's hexadecimal words; of one port, or of any."""
    own = {os.stat(path).st_ino for path in Path("/proc/self/fd").iterdir() if path.exists()}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, place = fields[1].split(":")
            if fields[3] == "0A" and int(fields[9]) in own and port in {None, int(place, 16)}:
                found.add(address)
    return found


def _meet_alone(rank: int, port: int, heard: Queue) -> None:
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"}
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    with joined(rank, 2, 60.0):
        heard.put((rank, all_gather(rank), _listening(port), _listening()))
        barrier()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc/net")
def test_ranks_of_one_machine_listen_on_its_loopback_device_alone():
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    heard = context.Queue()
    ranks = [context.Process(target=_meet_alone, args=(rank, port, heard)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        first, second = sorted(heard.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(60)
            process.kill()
    loopback = {"0100007F"}
    assert first == (0, [0, 1], loopback, loopback)  # rank 0 has the store
    assert second == (1, [0, 1], set(), loopback)
