"""What is taken for a lost peer, and what is this rank's own failure."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from functools import partial
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from runtime.distributed.peers import PeerLostError, or_peer_lost
from tests.integration.processes import wait_until

PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
BREAKS = (
    f"{PAIR} Connection closed by peer [127.0.0.1]:49885. This is typically caused by a remote worker",
    f"{PAIR} Read error [127.0.0.1]:2: Connection reset by peer",
    f"{PAIR} writev [127.0.0.1]:2: Broken pipe",
    "failed to recv, got 0 bytes",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error",
    "socketPollConnect: connect to 10.0.0.2<4242> returned Connection refused",
    "NCCL communicator was aborted on rank 0.",
)
SILENCES = (
    "[.../unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete",
    f"{PAIR} Application timeout caused pair closure",
    "wait timeout after 3000ms, keys: /default_pg/0//1//cpu//0/1",
    "Wait timeout",
    "Timeout waiting for key: default_pg/0//x after 1000 ms",
    "The client socket has timed out after 3000ms while trying to connect to (127.0.0.1, 41757).",
    "is setting up NCCL communicator and retrieving ncclUniqueId from [0], but store->get('0') got error: "
    "Socket Timeout",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)",
)
OWN = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: the launch timed out and was terminated", 702),
    dist.DistBackendError("NCCL error: unhandled cuda error, Last error: Cuda failure 'out of memory'"),
    dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500"),
    RuntimeError("Expected all tensors to be on the same device"),
    ValueError("Invalid process group specified"),
)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("text", BREAKS)
def test_a_closed_connection_is_a_lost_peer(text):
    with pytest.raises(PeerLostError, match=r"^the connection to rank 1 broke: "):
        or_peer_lost(lambda: _raise(RuntimeError(text)), 1)


@pytest.mark.parametrize("text", SILENCES)
def test_what_does_not_come_in_time_is_a_peer_that_does_not_answer(text):
    with pytest.raises(PeerLostError, match=r"^another rank did not answer: "):
        or_peer_lost(lambda: _raise(dist.DistStoreError(text)))


@pytest.mark.parametrize("error", OWN, ids=str)
def test_a_failure_of_this_ranks_own_blames_nobody(error):
    with pytest.raises(type(error)) as caught:
        or_peer_lost(lambda: _raise(error), 1)
    assert caught.value is error


def _wait_in_vain(rank: int, folder: str, ends: bool, call: str, results: Queue) -> None:
    """Rank 1 dies or is silent; rank 0 tells how it found that."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if Path("/sys/class/net/lo").exists() else "lo0"
    timeout = timedelta(seconds=60 if ends else 1)
    dist.init_process_group("gloo", Path(folder, "store").as_uri(), rank=rank, world_size=2, timeout=timeout)
    tensor = torch.zeros(3)
    if rank == 1:
        wait_until(Path(folder, "met").exists, 60)
        if ends:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    Path(folder, "met").touch()
    calls = {
        "recv": lambda: dist.irecv(tensor, 1).wait(),
        "all_reduce": partial(dist.all_reduce, tensor),
        "barrier": dist.barrier,
        "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
        "new_group": partial(dist.new_group, [0, 1], timeout=timedelta(seconds=1)),
    }
    try:
        or_peer_lost(calls[call], 1)
    except Exception as error:
        results.put((type(error).__name__, str(error)))


@pytest.mark.parametrize("call", ["recv", "all_reduce", "barrier", "all_gather_object", "new_group"])
@pytest.mark.parametrize("ends", [True, False], ids=["killed", "silent"])
def test_gloo_and_its_store_still_put_it_in_these_words(ends, call, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_wait_in_vain, args=(rank, str(tmp_path), ends, call, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        kind, text = results.get(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert kind == "PeerLostError", text
    broke = ends and call != "new_group"  # which meets at the store
    assert text.startswith("the connection to rank 1 broke" if broke else "rank 1 did not answer")
