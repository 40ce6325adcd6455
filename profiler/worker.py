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

from muxtune.graph import frozen_products
from muxtune.graph.attention_backends import AttentionSuite
from muxtune.graph.operators import COLLECTIVE_KINDS, OPERATOR_SUITES, Operator
from muxtune.support.allocator import keep_freed_memory
from muxtune.support.processes import end_process, end_with_parent
from profiler.attention import hold_contest
from profiler.devices import DEVICES, Device
from profiler.jobs import Job
from profiler.links import RankGroup
from profiler.load import ProcessorShare
from profiler.measure import measure_operator
from profiler.progress import OVERLAP_LIMITS
from profiler.rendezvous import Rendezvous
from profiler.timing import CpuTimer
from profiler.worker_protocol import Line, Reading, write_line

JOB_FILE = "job.json"
RENDEZVOUS = "rendezvous"
_STORE_FILE = "store"


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
    if job.communicates and device.rank < job.link_ranks:
        _measure_links(job, device, folder, say)
    if job.operators and device.rank < job.ranks:
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
        found = group.overlap(tokens, forward, job.model, OVERLAP_LIMITS * job.limit_s)
        if found is not None:
            say(found)
    group.close()


def _measure_operators(job: Job, device: Device, folder: Path, say: Callable[[Line], None]) -> None:
    rendezvous = Rendezvous(folder / RENDEZVOUS, device.rank, job.ranks)
    suite = OPERATOR_SUITES.get(job.suite)
    if isinstance(suite, AttentionSuite) and job.attention is not None:
        suite = suite.with_attention(job.attention)
    elif isinstance(suite, AttentionSuite):
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
    if isinstance(device.timer, CpuTimer):
        timer = device.timer
        say(ProcessorShare(rank=device.rank, computed_s=timer.computed_s, elapsed_s=timer.elapsed_s))


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
