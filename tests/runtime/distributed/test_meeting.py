"""Ranks that start seconds apart, with a short time to answer once they all train."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing import Queue
from pathlib import Path

import torch.distributed as dist

from runtime.distributed.agreement import barrier
from runtime.distributed.meeting import meet, patient_collectives
from runtime.distributed.peers import PeerLostError

PEER_TIMEOUT_S = 1.0
LATE_S = 3.0


def _start(rank: int, folder: str, results: Queue) -> None:
    """Be one of two ranks, of which the second is late each time."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if Path("/sys/class/net/lo").exists() else "lo0"
    come = []
    try:
        time.sleep(LATE_S * rank)
        meet(dist.FileStore(str(Path(folder, "store")), 2), rank, 2, PEER_TIMEOUT_S)
        come.append("met")
        with patient_collectives(PEER_TIMEOUT_S):
            time.sleep(LATE_S * rank)
            barrier()
        come.append("ready")
        time.sleep(LATE_S * rank)
        barrier()
        come.append("trained")
    except PeerLostError as error:
        come.append(str(error).split(":")[0])
    results.put((rank, come))


def test_ranks_are_patient_until_all_of_them_train(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_start, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        told = dict(results.get(timeout=90) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert told[0] == ["met", "ready", "another rank did not answer"]
    assert told[1][:2] == ["met", "ready"]
