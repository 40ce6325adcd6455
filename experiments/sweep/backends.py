"""Where batches run: worker processes of this machine (loky), or a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from functools import cache
from importlib.util import find_spec
from threading import Thread
from typing import Literal

import joblib

from experiments.sweep.execution import Batch, BatchOutcome, CostsSource, plan_batch
from muxtune.support.errors import RunError, UserError

Backend = Literal["loky", "ray"]

_WATCH_S = 0.5

_WAVE = 4
"""Batches per Ray worker that are handed out before any of them counts as finished."""


def check_backend(backend: Backend) -> None:
    """Refuse a backend that is not installed.

    Raises:
        UserError: It is not installed; has the command that installs it.
    """
    if backend == "ray" and find_spec("ray") is None:
        raise UserError("--backend ray needs Ray: pip install 'muxtune[ray]'")


def run_batches(
    batches: Sequence[Batch], source: CostsSource, *, jobs: int | None, backend: Backend
) -> Iterator[BatchOutcome]:
    """Outcomes of batches, in the order in which they finish.

    Args:
        batches: Batches to plan.
        source: Source of operator costs.
        jobs: Processes; by default one per core of this machine, or of the Ray cluster.
        backend: Backend that runs them.

    Raises:
        RunError: A process died.
    """
    run = _run_with_ray if backend == "ray" else _run_locally
    try:
        yield from run(batches, source, jobs)
    except BrokenExecutor as error:
        raise RunError(f"a worker of the sweep died, perhaps for want of memory: {error}") from error


def _run_locally(batches: Sequence[Batch], source: CostsSource, jobs: int | None) -> Iterator[BatchOutcome]:
    wanted = min(jobs or joblib.cpu_count(), len(batches))
    # One dispatched batch per worker in waiting: whatever is in flight is lost with a kill.
    parallel = joblib.Parallel(
        n_jobs=max(wanted, 1), return_as="generator_unordered", batch_size=1, pre_dispatch="2 * n_jobs"
    )
    yield from parallel(joblib.delayed(_plan_in_worker)(batch, source, os.getpid()) for batch in batches)


def _plan_in_worker(batch: Batch, source: CostsSource, parent: int) -> BatchOutcome:
    _end_with(parent)
    return plan_batch(batch, source)


@cache
def _end_with(parent: int) -> None:
    """Let a worker end soon after its parent; loky's would wait minutes for more work if that was killed."""
    if os.getpid() != parent:
        Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _run_with_ray(batches: Sequence[Batch], source: CostsSource, jobs: int | None) -> Iterator[BatchOutcome]:
    """Outcomes in waves, as Ray's backend for joblib returns nothing before all is done."""
    from ray.util.joblib import register_ray

    register_ray()
    with joblib.parallel_config(backend="ray", n_jobs=jobs or -1), joblib.Parallel(batch_size=1) as parallel:
        wave = _WAVE * joblib.effective_n_jobs(jobs or -1)
        for start in range(0, len(batches), wave):
            some = batches[start : start + wave]
            yield from parallel(joblib.delayed(plan_batch)(batch, source) for batch in some)
