"""A profiling session: measures what a profile lacks, and stores it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence, Set
from contextlib import closing
from pathlib import Path

from muxtune.costs.conditions import conditions_digest, foreign_conditions
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import (
    ClockReading,
    Measurement,
    Overlap,
    Overlaps,
    Profile,
    load_profile,
    save_profile,
)
from muxtune.graph.attention_backends import AttentionContest
from muxtune.graph.operators import Operator, Phase
from muxtune.model import ModelSpec
from muxtune.support.errors import SpecError, UserError, unknown_name
from muxtune.support.files import written_file
from muxtune.support.processes import keeping
from profiler.devices import DEVICES, Description
from profiler.jobs import Job, plan_job, remaining_job
from profiler.journal import Journal, open_journal
from profiler.load import ProcessorShare, busy_machine, taken_cores
from profiler.processes import measured_lines
from profiler.progress import shown
from profiler.provenance import add_session, build_provenance, in_order
from profiler.timing import Sample, merge_samples
from profiler.worker_protocol import Line, Reading, read_line

_MAX_RANKS = 64


def profile_model(  # an argument per choice of a session
    model: ModelSpec,
    *,
    device: str = "cpu",
    out: Path | None = None,
    ranks: int | None = None,
    quick: bool = False,
    kinds: Set[str] = PLAIN_KINDS,
    fresh: bool = False,
    progress: bool = False,
) -> Profile:
    """Measure the operators of a backbone on this machine.

    Ranks of a real run share caches and memory bandwidth, so several processes measure the same operator at
    the same time; the profile has the median over them. Transfers are measured between two processes, and
    collectives of 2, 4, ... and all ranks; GPUs must not be shared for that, so one GPU alone has neither, as
    the provenance then says. Several ranks also measure what they lose that compute beside a collective.

    A profile that is there already under the same conditions is added to: what it has stays as it is, and
    kinds that it lacks are measured. Until the profile is written, readings are kept beside it, so that the
    same call goes on where a stopped one was.

    Args:
        model: The backbone.
        device: ``cpu`` (one thread per process) or ``cuda`` (one GPU per process, in turn).
        out: Where to store the profile; it is written whole at the end or not at all.
        ranks: Processes that measure at once; by default 2, or 1 on a single core or GPU.
        quick: A coarser grid, in a third of the time.
        kinds: Kinds of operators that are needed (:mod:`muxtune.costs.needs`); by default plain LoRA's.
        fresh: Measure everything anew, and replace the profile that is there.
        progress: Show on stderr how far it is, and whether the machine is busy.

    Returns:
        The profile, with everything that it has now.

    Raises:
        UserError: Unknown or absent device, a senseless number of ranks, a place that cannot be written, a
            profile there that was measured under other conditions.
        RunError: A measuring process failed.
        Stopped: A signal came that :func:`muxtune.support.processes.stoppable` waits for.
    """
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    available = DEVICES[device].count()
    if ranks is not None and not 1 <= ranks <= _MAX_RANKS:
        raise SpecError("ranks", ranks, f"1 to {_MAX_RANKS}")
    ranks = ranks or min(2, available)
    target = None if out is None else _checked_place(out)
    former = None if fresh or target is None or not target.exists() else _former(target, model, device, ranks)
    job = plan_job(
        model,
        device,
        ranks,
        kinds=kinds - (frozenset() if former is None else former.kinds),
        link_ranks=_link_ranks(device, ranks, available),
        quick=quick,
        attention=None if former is None else former.attention,
    )
    if former is not None and job.is_empty:
        return former
    conditions = f"{conditions_digest(model, ranks)} {device} {'quick' if quick else 'full'}"
    with open_journal(target, conditions) as journal, keeping(lambda: _kept(journal)):
        lines = _measure(job, journal, progress=progress)
        profile = assemble_profile(job, lines, available, former)
        if out is not None:
            save_profile(profile, out)
        journal.remove()
    return profile


def _kept(journal: Journal) -> str:
    if journal.path is None or journal.is_empty:
        return "nothing is measured yet"
    return f"what is measured so far is kept in {journal.path}; the same command goes on from there"


def _checked_place(out: Path) -> Path | None:
    """The regular file that is written; None if it is none. Refuses before a minute what would fail after."""
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
    return target


def _former(path: Path, model: ModelSpec, device: str, ranks: int) -> Profile:
    """The profile that is there.

    Raises:
        UserError: It is none, or of other conditions.
    """
    profile = load_profile(path)
    foreign = foreign_conditions(profile, model, device, ranks)
    if foreign is not None:
        expected = f"another file, or --fresh to replace what was measured under other conditions ({foreign})"
        raise SpecError("out", str(path), expected)
    return profile


def _link_ranks(device: str, ranks: int, available: int) -> int:
    """Processes that communicate: as many as measure, and two at least, where each can have its device."""
    wanted = max(ranks, 2)
    communicating = wanted if DEVICES[device].shared_by_ranks else min(wanted, available)
    return communicating if communicating > 1 else 0


def _measure(job: Job, journal: Journal, *, progress: bool) -> Sequence[Line]:
    """Lines of this session and those before it."""
    left = remaining_job(job, journal.lines)
    described = any(isinstance(line, Description) for line in journal.lines)
    if left.is_empty and described:
        return journal.lines
    if progress and (busy := busy_machine(job.ranks)) is not None:
        warnings.warn(busy, stacklevel=3)
    said: list[Line] = []
    with shown(left, wanted=progress) as saw, closing(measured_lines(left)) as texts:
        for text in texts:
            line = read_line(text)
            journal.keep(text)
            said.append(line)
            saw(line)
    return (*journal.lines, *said)


def assemble_profile(
    job: Job, lines: Sequence[Line], available: int, former: Profile | None = None
) -> Profile:
    """The profile that the lines of a finished job make.

    Args:
        job: The whole job.
        lines: What its processes said, in one session or several.
        available: Devices of its kind that the machine has.
        former: A profile that it comes to.
    """
    wanted = {*job.operators, *job.links} | {("message", dims) for kind, dims in job.links if kind == "p2p"}
    readings = [
        line for line in lines if isinstance(line, Reading) and (line.op.kind, line.op.dims) in wanted
    ]
    clocks = {(line.rank, line.moment): line for line in lines if isinstance(line, ClockReading)}
    shares = [line for line in lines if isinstance(line, ProcessorShare)]
    session = build_provenance(
        job,
        [line for line in lines if isinstance(line, Description)][-1],
        clocks.values(),  # those of the last session, where one was stopped
        available,
        next((line for line in lines if isinstance(line, AttentionContest)), None),
        shares,
    )
    if (taken := taken_cores(shares)) is not None:
        warnings.warn(taken, stacklevel=3)
    measurements = _merge(readings)
    if former is not None:
        return add_session(former, measurements, session)
    return Profile(measurements, session, _overlaps(job, lines))


def _overlaps(job: Job, lines: Iterable[Line]) -> Overlaps | None:
    rounds = tuple(line for line in lines if isinstance(line, Overlap))
    return Overlaps(ranks=job.link_ranks, rounds=rounds) if rounds and job.overlaps else None


def _merge(readings: Sequence[Reading]) -> tuple[Measurement, ...]:
    samples: dict[tuple[Operator, Phase], list[Sample]] = {}
    for reading in readings:
        samples.setdefault((reading.op, reading.phase), []).append(reading.sample)
    merged = {key: merge_samples(found) for key, found in samples.items()}
    measurements = (
        Measurement(op, phase, sample.median_s, sample.p10_s, sample.p90_s, sample.repetitions)
        for (op, phase), sample in merged.items()
    )
    return tuple(sorted(measurements, key=in_order))
