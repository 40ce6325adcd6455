"""One measuring process: ``python -m profiler.worker FOLDER RANK``; prints a JSON line per measurement.

A process of its own, not a fork or a spawned child: it sees no state of the caller's (threads, __main__) and
may be started from notebooks and scripts alike.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from muxtune.graph import frozen_products
from muxtune.graph.attention_backends import AttentionSuite
from muxtune.graph.operators import COLLECTIVE_KINDS, OPERATOR_SUITES, Operator
from muxtune.model import ModelSpec
from muxtune.support.allocator import keep_freed_memory
from muxtune.support.processes import end_process, end_with_parent
from profiler.attention import hold_contest
from profiler.devices import DEVICES, Device
from profiler.links import RankGroup
from profiler.measure import measure_operator
from profiler.rendezvous import Rendezvous
from profiler.worker_protocol import Line, Reading, write_line

JOB_FILE = "job.json"
RENDEZVOUS_FILE = "rendezvous"
_STORE_FILE = "store"

_OVERLAP_LIMITS = 8
"""An overlap is three timings, of which the other ranks disturb each."""


class Job(BaseModel):
    """What the processes of one session measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec
    device: str
    suite: str
    ranks: int
    """Processes that measure the same operator at the same time."""
    operators: tuple[tuple[str, tuple[int, ...]], ...]
    """Kind and dimensions, in the order of measurement; one that stands there twice is measured twice."""
    link_ranks: int
    """Processes that communicate; 0 if none do."""
    links: tuple[tuple[str, tuple[int, ...]], ...]
    """Kind and dimensions of collectives and transfers, in order; they are measured first."""
    overlaps: tuple[int, ...] = ()
    """Tokens of a linear beside an all-reduce of all processes that communicate, in order."""
    limit_s: float
    """Seconds per operator and phase, each time."""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return max(self.ranks, self.link_ranks)


def measure_job(job: Job, device: Device, folder: Path, say: Callable[[Line], None]) -> None:
    """Measure everything; ranks beyond ``job.ranks`` only take part in what ranks do together."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(device.rank)
    keep_freed_memory()
    gc.disable()  # a collection would land in somebody's measurement
    if device.rank == 0:
        say(device.describe())
    say(device.read_clocks("before"))
    if device.rank < job.link_ranks:
        _measure_links(job, device, folder, say)
    if device.rank < job.ranks:
        _measure_operators(job, device, folder, say)
    say(device.read_clocks("after"))


def _measure_links(job: Job, device: Device, folder: Path, say: Callable[[Line], None]) -> None:
    sizes = sorted({dims[1] for kind, dims in job.links if kind in COLLECTIVE_KINDS})
    group = RankGroup(device, folder / _STORE_FILE, job.link_ranks, sizes)
    for kind, dims in job.links:
        for op, sample in group.measure(Operator(kind, dims), job.model, job.limit_s):
            say(Reading(op, "fwd", sample))
    suite = OPERATOR_SUITES.get(job.suite)
    for tokens in job.overlaps:
        op = Operator("linear", (*frozen_products(job.model)[0], tokens))
        forward, _ = suite.build(op, job.model, device.name, needs_backward=False)
        found = group.overlap(tokens, forward, job.model, _OVERLAP_LIMITS * job.limit_s)
        if found is not None:
            say(found)
    group.close()


def _measure_operators(job: Job, device: Device, folder: Path, say: Callable[[Line], None]) -> None:
    rendezvous = Rendezvous(folder / RENDEZVOUS_FILE, device.rank, job.ranks)
    suite = OPERATOR_SUITES.get(job.suite)
    if isinstance(suite, AttentionSuite):
        contest = hold_contest(
            suite,
            job.model,
            device,
            rendezvous=rendezvous,
            ranks=job.ranks,
            folder=folder,
            limit_s=job.limit_s,
        )
        suite = suite.with_attention(contest.chosen)
        if device.rank == 0:
            say(contest)
    for kind, dims in job.operators:
        op = Operator(kind, dims)
        readings = measure_operator(op, job.model, suite, device, rendezvous=rendezvous, limit_s=job.limit_s)
        for phase, sample in readings:
            say(Reading(op, phase, sample))
        gc.collect(0)


def main(folder: Path, rank: int) -> None:
    """Entry of the process."""
    end_with_parent()
    # Whatever a library prints goes to stderr; stdout carries the readings alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job.model_validate_json((folder / JOB_FILE).read_text())
    device = DEVICES[job.device](rank)
    measure_job(job, device, folder, lambda line: print(write_line(line), file=out, flush=True))
    end_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
