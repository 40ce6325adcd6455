"""A profiling session: starts the measuring processes, gathers their readings, stores the profile."""

from __future__ import annotations

import os
import random
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

from muxtune.cluster import load_cluster
from muxtune.costs.profile import ClockReading, Measurement, Overlap, Overlaps, Profile, save_profile
from muxtune.graph.attention_backends import AttentionContest
from muxtune.graph.operators import COLLECTIVE_KINDS, FWD_ONLY, LINK_KINDS, Operator, Phase
from muxtune.model import ModelSpec
from muxtune.support.errors import RunError, SpecError, UserError, unknown_name
from muxtune.support.files import written_file
from profiler.devices import DEVICES, Description
from profiler.grid import operator_grid, powers
from profiler.provenance import build_provenance
from profiler.rendezvous import create_rendezvous
from profiler.timing import Sample, merge_samples
from profiler.worker import JOB_FILE, RENDEZVOUS_FILE, Job
from profiler.worker_protocol import Line, Reading, read_line

_SUITE = "torch"
_MAX_RANKS = 64

_LIMIT_S, _QUICK_LIMIT_S = 0.075, 0.1
"""Seconds per operator, phase and round, and those of a quick profile."""

_ROUNDS, _QUICK_ROUNDS = 2, 1
"""Operators are measured so often, minutes apart, so that a burst of other load does not own a shape."""

_TRANSFER_ROUNDS = 3
_COLLECTIVE_ROUNDS = 2

_OVERLAP_TOKENS = (64, 256, 1024)
"""Tokens of a linear beside an all-reduce: small, usual and large micro-batches."""

_SILENCE_S = 600.0
"""A session that hears nothing for so long has lost a process."""

_PIPE_BYTES = 1 << 16


def profile_model(
    model: ModelSpec,
    *,
    device: str = "cpu",
    out: Path | None = None,
    ranks: int | None = None,
    quick: bool = False,
    progress: bool = False,
) -> Profile:
    """Measure the operators of a backbone on this machine.

    Ranks of a real run share caches and memory bandwidth, so several processes measure the same operator at
    the same time; the profile has the median over them. Transfers are measured between two processes, and
    collectives of 2, 4, ... and all ranks; GPUs must not be shared for that, so one GPU alone has neither, as
    the provenance then says. Several ranks also measure what they lose that compute beside a collective.

    Args:
        model: The backbone.
        device: ``cpu`` (one thread per process) or ``cuda`` (one GPU per process, in turn).
        out: Where to store the profile; it is written whole at the end or not at all.
        ranks: Processes that measure at once; by default 2, or 1 on a single core or GPU.
        quick: A coarser grid, in a third of the time.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: Unknown or absent device, a senseless number of ranks, a place that cannot be written.
        RunError: A measuring process failed.
    """
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    available = DEVICES[device].count()
    if ranks is not None and not 1 <= ranks <= _MAX_RANKS:
        raise SpecError("ranks", ranks, f"1 to {_MAX_RANKS}")
    ranks = ranks or min(2, available)
    if out is not None:
        _check_writable(out)
    job = _plan_job(model, device, ranks, link_ranks=_link_ranks(device, ranks, available), quick=quick)
    lines = _measure(job, progress=progress)
    (description,) = (line for line in lines if isinstance(line, Description))
    clocks = [line for line in lines if isinstance(line, ClockReading)]
    measurements = _merge([line for line in lines if isinstance(line, Reading)])
    overlaps = _overlaps(job, [line for line in lines if isinstance(line, Overlap)])
    contest = next((line for line in lines if isinstance(line, AttentionContest)), None)
    provenance = build_provenance(job, description, clocks, available, contest)
    profile = Profile(measurements, provenance, overlaps)
    if out is not None:
        save_profile(profile, out)
    return profile


def _check_writable(out: Path) -> None:
    """Refuse before a minute of measurement what would fail after it."""
    if out.is_dir():
        raise SpecError("out", str(out), "a file, not a directory")
    try:
        target = written_file(out)
        place = out if target is None else target.parent
        if target is not None:
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the profile {out}: {error.strerror}") from error
    if not os.access(place, os.W_OK):
        raise UserError(f"cannot write the profile {out}: no permission")


def _check_room(model: ModelSpec, ranks: int, grid: Sequence[Operator]) -> None:
    """Refuse before anything is allocated a backbone whose largest measured stage no rank can hold."""
    layers = max((op.dims[0] for op in grid if op.kind == "stage"), default=1)
    loaded = model.model_copy(update={"source": "preset", "layers": layers, "vocab": 8})
    needed = loaded.loading_bytes + layers * model.layer_parameters * model.dtype_bytes
    available = load_cluster(f"cpu-{ranks}").device.memory_bytes
    if needed > available:
        need, has = (bytes_ / 2**30 for bytes_ in (needed, available))
        expected = f"one of which {layers} layers fit a rank: they need {need:.1f} GiB, it has {has:.1f} GiB"
        raise SpecError("model", model.name, expected)


def _link_ranks(device: str, ranks: int, available: int) -> int:
    """Processes that communicate: as many as measure, and two at least, where each can have its device."""
    wanted = max(ranks, 2)
    communicating = wanted if DEVICES[device].shared_by_ranks else min(wanted, available)
    return communicating if communicating > 1 else 0


def _plan_job(model: ModelSpec, device: str, ranks: int, *, link_ranks: int, quick: bool) -> Job:
    grid = operator_grid(model, quick=quick, group_sizes=powers(2, max(link_ranks, 2), 2))
    if device == "cpu":
        _check_room(model, ranks, grid)
    compute = [op for op in grid if op.kind not in LINK_KINDS]
    transfers = [op for op in grid if op.kind == "p2p"]  # which measures messages too
    collectives = [op for op in grid if op.kind in COLLECTIVE_KINDS]
    links = transfers * _TRANSFER_ROUNDS + collectives * _COLLECTIVE_ROUNDS if link_ranks else []
    order = random.Random(0)  # load that comes and goes must not follow an axis of the grid
    operators: list[Operator] = []
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    for _ in range(rounds):
        operators += order.sample(compute, len(compute))
    return Job(
        model=model,
        device=device,
        suite=_SUITE,
        ranks=ranks,
        operators=tuple((op.kind, op.dims) for op in operators),
        link_ranks=link_ranks,
        links=tuple((op.kind, op.dims) for op in links),
        overlaps=_OVERLAP_TOKENS * rounds if link_ranks and ranks > 1 else (),
        limit_s=_QUICK_LIMIT_S if quick else _LIMIT_S,
    )


def _measure(job: Job, *, progress: bool) -> list[Line]:
    phases = sum(1 if kind in FWD_ONLY else 2 for kind, _ in job.operators)
    link_readings = sum(2 if kind == "p2p" else 1 for kind, _ in job.links)
    link_readings += len(job.overlaps)
    total = job.ranks * phases + link_readings + 1 + 2 * job.processes  # a description, clocks twice
    with TemporaryDirectory(prefix="muxtune-profile-") as name:
        folder = Path(name)
        (folder / JOB_FILE).write_text(job.model_dump_json())
        create_rendezvous(folder / RENDEZVOUS_FILE, job.ranks)
        with _processes(folder, job.processes) as processes:
            lines = _lines(processes, folder)
            if progress:
                lines = _with_progress(lines, total, f"{job.model.name} on {job.device}")
            return [read_line(line) for line in lines]


@contextmanager
def _processes(folder: Path, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Measuring processes; none is left when the block ends, however it ends."""
    # The caller's import path as it is, and nothing else: -P keeps the current directory out.
    path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # As the runtime has it: gloo would otherwise look for an interface by the host's name.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(number):
            command = [sys.executable, "-P", "-m", "profiler.worker", str(folder), str(rank)]
            with _error_file(folder, rank).open("w") as errors:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # which ends when the session does
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the session alone, which then ends them
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                cast("IO[bytes]", pipe).close()


def _lines(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> Iterator[str]:
    """Lines of all processes as they come, until all have ended.

    Raises:
        RunError: One failed, or none says anything any more.
    """
    unfinished = [b""] * len(processes)
    with selectors.DefaultSelector() as selector:
        for rank, process in enumerate(processes):
            selector.register(cast("IO[bytes]", process.stdout), selectors.EVENT_READ, rank)
        while selector.get_map():
            ready = selector.select(_SILENCE_S)
            if not ready:
                raise RunError(f"profiling stalled: no reading for {_SILENCE_S:.0f} s")
            for key, _ in ready:
                rank = int(key.data)
                received = os.read(key.fd, _PIPE_BYTES)
                *whole, unfinished[rank] = (unfinished[rank] + received).split(b"\n")
                yield from (line.decode() for line in whole)
                if received:
                    continue
                selector.unregister(key.fileobj)
                if processes[rank].wait() != 0:
                    raise RunError(f"profiling failed on rank {rank}: {_last_line(folder, rank)}")


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"


def _last_line(folder: Path, rank: int) -> str:
    lines = _error_file(folder, rank).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


def _with_progress(lines: Iterator[str], total: int, title: str) -> Iterator[str]:
    from rich.console import Console
    from rich.progress import Progress

    # Redrawn rarely: the bar shares the cores with what is measured.
    with Progress(console=Console(stderr=True), refresh_per_second=1, transient=True) as bar:
        task = bar.add_task(title, total=total)
        for line in lines:
            bar.advance(task)
            yield line


def _overlaps(job: Job, rounds: Sequence[Overlap]) -> Overlaps | None:
    return Overlaps(ranks=job.link_ranks, rounds=tuple(rounds)) if rounds else None


def _merge(readings: Sequence[Reading]) -> tuple[Measurement, ...]:
    samples: dict[tuple[Operator, Phase], list[Sample]] = {}
    for reading in readings:
        samples.setdefault((reading.op, reading.phase), []).append(reading.sample)
    merged = {key: merge_samples(found) for key, found in samples.items()}
    return tuple(
        Measurement(op, phase, sample.median_s, sample.p10_s, sample.p90_s, sample.repetitions)
        for (op, phase), sample in sorted(
            merged.items(), key=lambda item: (item[0][0].kind, item[0][0].dims, item[0][1])
        )
    )
