"""Where the numbers of a profile come from: the machine, its libraries and settings, its clocks."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version

from muxtune.costs.profile import Addition, ClockReading, Measurement, Profile, Provenance
from muxtune.graph.attention_backends import AttentionContest
from profiler.devices import DEVICES, Description
from profiler.jobs import Job
from profiler.load import ProcessorShare, taken_cores

_SAME_CLOCK = 0.05
"""Clocks that differ by less, relatively, are the same one."""


def build_provenance(
    job: Job,
    description: Description,
    clocks: Iterable[ClockReading],
    devices: int,
    attention: AttentionContest | None = None,
    shares: Iterable[ProcessorShare] = (),
) -> Provenance:
    """Provenance of a session that is over.

    Args:
        job: What was measured.
        description: Description of rank 0's device.
        clocks: Clocks of every process, before and after.
        devices: Devices of the job's kind that the machine has.
        attention: What the choice of an attention backend came from, if there was one.
        shares: What ranks had of their cores.
    """
    clocks = tuple(sorted(clocks, key=lambda reading: (reading.rank, reading.moment == "after")))
    taken = taken_cores(shares)
    kind = DEVICES[job.device]
    packages = {package: version(package) for package in ("torch", "numpy", "muxtune")}
    return Provenance(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        model=job.model,
        device=job.device,
        ranks=job.ranks,
        threads=1,
        processor=description.processor,
        os=platform.platform(),
        versions={"python": platform.python_version(), **packages, **description.versions},
        backend=kind.backend if job.links else None,
        settings=description.settings,
        clocks=clocks,
        attention=attention,
        notes=(*_sharing_notes(job, devices), *_clock_notes(clocks), *([] if taken is None else [taken])),
    )


def add_session(former: Profile, measurements: Iterable[Measurement], session: Provenance) -> Profile:
    """A profile with what a later session under the same conditions has measured beside it.

    Args:
        former: What was there.
        measurements: Measurements of kinds that it lacks.
        session: Provenance that the later session has by itself.
    """
    measurements = tuple(measurements)
    addition = Addition(
        created_utc=session.created_utc,
        kinds=tuple(sorted({m.op.kind for m in measurements})),
        clocks=session.clocks,
        notes=tuple(note for note in session.notes if note not in former.provenance.notes),
    )
    additions = (*former.provenance.additions, addition)
    return Profile(
        tuple(sorted((*former.measurements, *measurements), key=in_order)),
        former.provenance.model_copy(update={"additions": additions}),
        former.overlaps,
    )


def in_order(m: Measurement) -> tuple[str, tuple[int, ...], str]:
    """Place of a measurement in a profile."""
    return m.op.kind, m.op.dims, m.phase


def _sharing_notes(job: Job, devices: int) -> Iterator[str]:
    if not job.link_ranks:
        yield f"no messages, no collectives: they need two devices of kind {job.device}, of which there is 1"
    if job.ranks > devices:
        yield f"{job.ranks} ranks shared {devices} of the kind {job.device}"


def _clock_notes(clocks: Iterable[ClockReading]) -> Iterator[str]:
    before: dict[int, ClockReading] = {}
    for reading in clocks:
        if reading.throttled_by:
            reasons = ", ".join(reading.throttled_by)
            yield f"rank {reading.rank}, {reading.moment} the measurement: clocks held down by {reasons}"
        if reading.moment == "before":
            before[reading.rank] = reading
            continue
        for name, mhz in reading.mhz.items():
            first_mhz = before[reading.rank].mhz.get(name, mhz) if reading.rank in before else mhz
            if abs(mhz / first_mhz - 1) > _SAME_CLOCK:
                yield f"rank {reading.rank}: the {name} clock went from {first_mhz:.0f} to {mhz:.0f} MHz"
