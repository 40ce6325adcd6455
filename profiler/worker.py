"""One measuring process: ``python -m profiler.worker FOLDER RANK``; prints a JSON line per measurement.

A process of its own, not a fork or a spawned child: it sees no state of the caller's (threads, __main__) and
may be started from notebooks and scripts alike.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from muxtune.allocator import keep_freed_memory
from muxtune.model import ModelSpec
from muxtune.operators import OPERATOR_SUITES, Operator, Phase
from profiler.measure import measure_operator
from profiler.rendezvous import OrphanedError, Rendezvous
from profiler.timing import Sample, timer_for
from profiler.transfers import PingPong

JOB_FILE = "job.json"
RENDEZVOUS_FILE = "rendezvous"
_STORE_FILE = "store"


class Job(BaseModel):
    """What the processes of one session measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec
    device: str
    suite: str
    ranks: int
    parent: int
    """Process id of the session."""
    operators: tuple[tuple[str, tuple[int, ...]], ...]
    """Kind and dimensions, in the order of measurement; one that stands there twice is measured twice."""
    transfers_bytes: tuple[int, ...]
    limit_s: float
    """Per operator and phase, each time."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one rank measured, once."""

    op: Operator
    phase: Phase
    sample: Sample

    def to_json(self) -> str:
        """As one line."""
        entry = {"kind": self.op.kind, "dims": self.op.dims, "phase": self.phase, **asdict(self.sample)}
        return json.dumps(entry)

    @classmethod
    def from_json(cls, line: str) -> Reading:
        """Inverse of :meth:`to_json`."""
        entry = json.loads(line)
        op = Operator(entry.pop("kind"), tuple(entry.pop("dims")))
        return cls(op, entry.pop("phase"), Sample(**entry))


def measure_job(job: Job, folder: Path, rank: int, out: TextIO) -> None:
    """Measure everything; ranks beyond ``job.ranks`` only take part in the transfers."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    keep_freed_memory()
    gc.disable()  # a collection would land in somebody's measurement
    if job.transfers_bytes and rank < 2:
        _measure_transfers(job, folder, rank, out)
    if rank < job.ranks:
        _measure_operators(job, folder, rank, out)


def _measure_transfers(job: Job, folder: Path, rank: int, out: TextIO) -> None:
    pair = PingPong(folder / _STORE_FILE, rank)
    for bytes_ in job.transfers_bytes:
        sample = pair.measure(bytes_, job.limit_s)
        if sample is not None:
            print(Reading(Operator("p2p", (bytes_,)), "fwd", sample).to_json(), file=out, flush=True)
    pair.close()


def _measure_operators(job: Job, folder: Path, rank: int, out: TextIO) -> None:
    import torch

    rendezvous = Rendezvous(folder / RENDEZVOUS_FILE, rank, job.ranks, job.parent)
    suite = OPERATOR_SUITES.get(job.suite)
    device = job.device if job.device == "cpu" else f"cuda:{rank % torch.cuda.device_count()}"
    timer = timer_for(device)
    for kind, dims in job.operators:
        op = Operator(kind, dims)
        readings = measure_operator(
            op, job.model, suite, device, timer=timer, rendezvous=rendezvous, limit_s=job.limit_s
        )
        for phase, sample in readings:
            print(Reading(op, phase, sample).to_json(), file=out, flush=True)
        gc.collect(0)


def main(folder: Path, rank: int) -> None:
    """Entry of the process."""
    # Whatever a library prints goes to stderr; stdout carries the readings alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job.model_validate_json((folder / JOB_FILE).read_text())
    try:
        measure_job(job, folder, rank, out)
    except OrphanedError:
        sys.exit("the session is gone")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
