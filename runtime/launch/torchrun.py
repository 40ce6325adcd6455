"""Being one rank of a job that torchrun started: connecting, and failing in one voice.

A torchrun ends the ranks of its own node as soon as one of them has failed, and lists the failed ones. Ranks
of other nodes only see that a connection broke. So the rank that has a cause tells it; a rank that lost
another one closes its own connections, waits to be ended, and otherwise leaves a line for its torchrun to
show.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from muxtune.support.errors import MuxTuneError, RunError, SpecError, UserError
from runtime.device.torch_internals import abort_groups
from runtime.distributed.agreement import barrier
from runtime.distributed.meeting import START_TIMEOUT_S, meet
from runtime.distributed.peers import PeerLostError, or_peer_lost

if TYPE_CHECKING:
    from runtime.device.torch_internals import Store

END_WAIT_S = 3.0
"""How long a rank that lost another one waits for its torchrun, which looks ten times a second."""

_LOOPBACK = "127.0.0.1"

_ABORT_WAIT_S = 1.0
"""How long NCCL may take to give up what is under way."""


@contextmanager
def joined(rank: int, world: int, peer_timeout_s: float) -> Iterator[None]:
    """Connect the ranks of torchrun's job, and part when all are done.

    Args:
        rank: Rank of this process.
        world: Number of ranks.
        peer_timeout_s: How long to wait for another rank's message.

    Raises:
        UserError: From inside, with the rank in front.
        RunError: From inside, with the rank in front, and for torch's own errors.
        PeerLostError: Another rank has the cause, and torchrun shows what we know of it.
    """
    try:
        if world > 1:
            _connect(peer_timeout_s)
        yield
        barrier()
    except PeerLostError as error:
        if dist.is_initialized():
            _hang_up()
        time.sleep(END_WAIT_S)
        if _leave_word(f"rank {rank} ended: {error}"):
            raise
        raise RunError(f"rank {rank}: {error}") from error
    except MuxTuneError as error:
        kind = UserError if isinstance(error, UserError) else RunError
        raise kind(f"rank {rank}: {error}") from error
    except RuntimeError as error:  # torch's, as when its memory is full
        raise RunError(f"rank {rank}: {type(error).__name__}: {error}") from error
    if dist.is_initialized():
        dist.destroy_process_group()


def job_place() -> tuple[int, int]:
    """Our rank and the number of ranks, from the environment.

    Raises:
        SpecError: A variable that the ranks need to meet is missing, or means nothing.
    """
    world = _variable("WORLD_SIZE", "the number of ranks", least=1)
    rank = _variable("RANK", f"the number of this rank, 0 to {world - 1}", most=world - 1)
    if world > 1:
        _variable("MASTER_PORT", "a free port of MASTER_ADDR, the same for all ranks", least=1, most=65535)
    return rank, world


def check_node_place() -> None:
    """Refuse an environment that does not say which ranks are on this machine.

    Raises:
        SpecError: A variable is missing, or means nothing.
    """
    ranks = _variable(
        "LOCAL_WORLD_SIZE", "the number of ranks on this machine (SLURM_NTASKS_PER_NODE)", least=1
    )
    number = f"this rank's number on its machine, 0 to {ranks - 1} (SLURM_LOCALID)"
    _variable("LOCAL_RANK", number, most=ranks - 1)


def _variable(name: str, meaning: str, *, least: int = 0, most: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        raise SpecError(name, text, f"{meaning}; torchrun sets it beside RANK, WORLD_SIZE and MASTER_ADDR")
    return int(text)


def _connect(peer_timeout_s: float) -> None:
    if sys.platform == "linux" and _all_are_here():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo listens there alone
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meet(or_peer_lost(partial(_store, rank, world)), rank, world, peer_timeout_s)
    except (RuntimeError, OSError) as error:
        raise RunError(f"no connection to the other ranks: {error}") from error


def _store(rank: int, world: int) -> Store:
    """Store in which the ranks meet; one of our own listens on the loopback device if all are here.

    A torchrun has one already, and torch's own would listen on every device: it can be told nothing else.
    """
    timeout = timedelta(seconds=START_TIMEOUT_S)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not _all_are_here():
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store
    address, port = _LOOPBACK, int(os.environ["MASTER_PORT"])
    listener = socket.create_server((address, port)).detach() if rank == 0 else None
    return dist.TCPStore(  # type: ignore[attr-defined]  # not in stub
        address, port, world, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener
    )


def _all_are_here() -> bool:
    """Whether the launcher says that all ranks are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _hang_up() -> None:
    """Let our neighbours see at once what they would else learn from our end.

    Gloo closes connections only once nothing refers to their group any more, not even a traceback.
    """
    abort = threading.Thread(target=_abort_groups, daemon=True)
    abort.start()
    abort.join(_ABORT_WAIT_S)
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed by now
            _shut_down(int(name))


def _abort_groups() -> None:
    with suppress(RuntimeError, UserError):  # the sockets are closed all the same
        abort_groups()


def _shut_down(descriptor: int) -> None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in {socket.AF_INET, socket.AF_INET6}:
            connection.getpeername()  # raises for one that listens: gloo aborts if that ends
            connection.shutdown(socket.SHUT_RDWR)


def _leave_word(message: str) -> bool:
    """Have torchrun show a message beside the exit code; False if no torchrun asks for one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    line = " ".join(message.split())
    Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    return True
