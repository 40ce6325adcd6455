"""A stored profile: what operators cost on one device, and where the numbers come from (Parquet)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.ref import CostsRef
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionContest, AttentionName
from muxtune.model import ModelSpec
from muxtune.operators import KINDS, MOST_DIMS, PHASES, Operator, Phase, dimensions
from muxtune.peft import all_kinds
from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_atomically
from muxtune.support.strict_models import MOST_SECONDS
from muxtune.support.user_files import check_regular

PROFILE_FORMAT = 2
"""Raised when kinds of operators, the grid or the meaning of a number change; the machine is then measured
anew."""

_METADATA_KEY = b"muxtune.profile"
_OVERLAPS_KEY = b"muxtune.overlaps"
_DIM_COLUMNS = tuple(f"d{i}" for i in range(MOST_DIMS))
_COLUMNS = (
    *("device", "dtype", "model", "kind", *_DIM_COLUMNS, "dims", "phase"),
    *("median_s", "p10_s", "p90_s", "repetitions"),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Latency of one operator in one phase."""

    op: Operator
    phase: Phase
    median_s: float
    """Median over ranks and rounds of each one's median."""
    p10_s: float
    """Tenth percentile, taken over ranks and rounds as the median is."""
    p90_s: float
    repetitions: int
    """Timed calls of all ranks and rounds."""


class ClockReading(BaseModel):
    """Clocks of one rank's device at one moment, read while it was busy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    moment: Literal["before", "after"]
    """Whether they were read before or after the measurement."""
    mhz: dict[str, float]
    """Frequency by clock: ``core`` of a CPU, ``sm`` and ``memory`` of a GPU; empty where none can be read."""
    throttled_by: tuple[str, ...] = ()
    """What holds the clocks down, in the driver's words."""


class Addition(BaseModel):
    """A session that measured what an earlier profile lacked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    created_utc: str
    """ISO 8601."""
    kinds: tuple[str, ...] = Field(min_length=1)
    """Kinds that were measured."""
    clocks: tuple[ClockReading, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences, as in the provenance."""


class Provenance(BaseModel):
    """How, where and for which backbone a profile was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    created_utc: str
    """ISO 8601."""
    model: ModelSpec
    device: str
    ranks: int = Field(gt=0)
    """Processes that ran the same operator at the same time."""
    threads: int = Field(gt=0)
    """Threads per process."""
    processor: str
    os: str
    versions: dict[str, str]
    """Versions of python, torch, numpy and muxtune, and of the libraries that compute on the device."""
    backend: str | None = None
    """Backend of torch.distributed that messages and collectives went through; None if there were none."""
    settings: dict[str, str] = {}
    """Settings of the device, as far as it tells: power limit, frequency governor, instruction set."""
    clocks: tuple[ClockReading, ...] = ()
    attention: AttentionContest | None = None
    """Contest that chose the attention backend that was measured; None for a suite that has one only."""
    notes: tuple[str, ...] = ()
    """Sentences: what was left out and why, clocks that fell."""
    additions: tuple[Addition, ...] = ()
    """Later sessions under the same conditions, in which further kinds were measured."""


SHORTEST_S = 1e-7
"""What a collective adds to computing, at least: less cannot be told from noise."""


class Overlap(BaseModel):
    """Computing in parts, with an all-reduce after each, in one round.

    Seconds are of one part: medians over rows of parts, each divided by the length of a row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int = Field(gt=0)
    """Tokens of a frozen linear's input; the all-reduce is of hidden states of as many."""
    calls: int = Field(gt=0)
    """Calls of the linear in a part, so many that it takes longer than the all-reduce."""
    compute_s: float = Field(gt=0)
    """Seconds of computing alone."""
    communication_s: float = Field(gt=0)
    """What the all-reduce adds to it, if it is waited for at once."""
    both_s: float = Field(gt=0)
    """Seconds with all-reduces that are not waited for before the next parts are through."""

    @property
    def contention(self) -> float:
        """Factor in ``both_s = compute_s + contention * communication_s``, at least 0."""
        return max(0.0, (self.both_s - self.compute_s) / self.communication_s)


class Overlaps(BaseModel):
    """What computing and communicating at once costs the ranks of a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(gt=1)
    """Ranks that took part in each all-reduce."""
    rounds: tuple[Overlap, ...] = Field(min_length=1)
    """Sizes, as often as they were measured."""

    @property
    def contention(self) -> float:
        """Seconds that computing was held up, per second of communication, over all sizes and rounds.

        A mean, because collectives that take ten times as long now and then are what a stage pays for.
        """
        held_up_s = sum(each.both_s - each.compute_s for each in self.rounds)
        return max(0.0, held_up_s / sum(each.communication_s for each in self.rounds))

    @property
    def doubts(self) -> list[str]:
        """What the rounds could not tell, as sentences."""
        hidden = sum(each.communication_s <= SHORTEST_S for each in self.rounds)
        if not hidden:
            return []
        return [
            f"in {hidden} of {len(self.rounds)} rounds an all-reduce added nothing measurable to computing: "
            "what overlap costs is known from the others alone"
        ]


@dataclass(frozen=True)
class Profile:
    """Measured latencies with their provenance."""

    measurements: tuple[Measurement, ...]
    provenance: Provenance
    overlaps: Overlaps | None = None
    """None of a profile of one rank, or from before it was measured."""

    @property
    def model(self) -> ModelSpec:
        """Backbone whose operators were measured."""
        return self.provenance.model

    @property
    def attention(self) -> AttentionName:
        """Attention backend that was measured."""
        contest = self.provenance.attention
        return DEFAULT_ATTENTION if contest is None else contest.chosen

    @cached_property
    def kinds(self) -> frozenset[str]:
        """Kinds that were measured."""
        return frozenset(m.op.kind for m in self.measurements)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences of all its sessions."""
        added = (note for session in self.provenance.additions for note in session.notes)
        return tuple(dict.fromkeys((*self.provenance.notes, *added)))

    def of_kinds(self, kinds: Set[str]) -> Profile:
        """The part that is about some kinds; all of the session that measured the first ones is in it.

        What it says does not depend on which others were measured before, beside or after them.
        """
        if self.kinds <= kinds:
            return self
        additions = tuple(each for each in self.provenance.additions if kinds & set(each.kinds))
        return Profile(
            tuple(m for m in self.measurements if m.op.kind in kinds),
            self.provenance.model_copy(update={"additions": additions}),
            self.overlaps,
        )

    @cached_property
    def profile_id(self) -> str:
        """Readable name of the machine's first measurement: it stays when a profile grows.

        What plain LoRA needs has a name that no other content has; a kind that comes to it is measured once.
        """
        p = self.provenance
        return f"{p.device}-{p.model.name}-{p.model.dtype}-{self.of_kinds(PLAIN_KINDS).digest[:12]}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that was measured and the backbone's shapes."""
        hasher = hashlib.sha256(self.model.model_dump_json().encode())
        if self.attention != DEFAULT_ATTENTION:
            hasher.update(self.attention.encode())
        for m in self.measurements:
            hasher.update(
                f"{m.op} {m.phase} {m.median_s!r} {m.p10_s!r} {m.p90_s!r} {m.repetitions}\n".encode()
            )
        if self.overlaps is not None:
            hasher.update(self.overlaps.model_dump_json().encode())
        return hasher.hexdigest()

    @property
    def ref(self) -> CostsRef:
        """Identity, for a plan."""
        return CostsRef(profile_id=self.profile_id, device=self.provenance.device, digest=self.digest)

    def of_kind(self, kind: str) -> Iterator[Measurement]:
        """Measurements of one operator kind."""
        return (m for m in self.measurements if m.op.kind == kind)


def describe_dims(op: Operator) -> str:
    """Dimensions with their names, ``in_features=256,out_features=688,tokens=512``."""
    return ",".join(f"{name}={size}" for name, size in zip(dimensions(op.kind), op.dims, strict=True))


def save_profile(profile: Profile, path: Path) -> None:
    """Write a Parquet file that is whole or absent.

    Raises:
        UserError: The place cannot be written.
    """
    import pyarrow as pa  # noqa: PLC0415  # a tenth of a second to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    rows = [_row(m, profile.provenance) for m in profile.measurements]
    types = {"repetitions": pa.int64()} | dict.fromkeys(_DIM_COLUMNS, pa.int64())
    types |= dict.fromkeys(("median_s", "p10_s", "p90_s"), pa.float64())
    metadata = {_METADATA_KEY: profile.provenance.model_dump_json().encode()}
    if profile.overlaps is not None:
        metadata[_OVERLAPS_KEY] = profile.overlaps.model_dump_json().encode()
    schema = pa.schema([(name, types.get(name, pa.string())) for name in _COLUMNS], metadata=metadata)
    table = pa.Table.from_pylist(rows, schema=schema)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary), what="the profile")


def load_profile(path: Path) -> Profile:
    """Read a profile that :func:`save_profile` wrote.

    Raises:
        UserError: Missing, truncated or not such a file; the message says which.
    """
    import pyarrow as pa  # noqa: PLC0415  # a tenth of a second to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    check_regular(path, "the profile")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole Parquet file: {first_line}") from error
    except OSError as error:
        raise UserError(f"cannot read the profile {path}: {error.strerror or error}") from error
    metadata = table.schema.metadata or {}
    if _METADATA_KEY not in metadata:
        raise UserError(f"{path} is not a profile of ours: it has no provenance (muxtune profile writes one)")
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: expected the columns {', '.join(missing)}, which are missing")
    overlaps = None
    try:
        provenance = Provenance.model_validate_json(metadata[_METADATA_KEY])
        if _OVERLAPS_KEY in metadata:
            overlaps = Overlaps.model_validate_json(metadata[_OVERLAPS_KEY])
    except ValidationError as error:
        raise spec_error_from(error, f"{path}: {error.title.lower()}") from error
    rows = enumerate(table.to_pylist())
    measurements = tuple(_measurement(row, f"{path}: row {number}") for number, row in rows)
    return Profile(measurements, provenance, overlaps)


def load_provenance(path: Path) -> Provenance | None:
    """Where a profile comes from, without its measurements; None if the file is no profile of this format."""
    import pyarrow as pa  # noqa: PLC0415  # a tenth of a second to import
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        metadata = pq.read_schema(path).metadata or {}
        return Provenance.model_validate_json(metadata.get(_METADATA_KEY, b""))
    except (OSError, pa.ArrowException, ValidationError):
        return None


def _row(m: Measurement, provenance: Provenance) -> dict[str, object]:
    return {
        "device": provenance.device,
        "dtype": provenance.model.dtype,
        "model": provenance.model.name,
        "kind": m.op.kind,
        **dict(zip(_DIM_COLUMNS, m.op.dims, strict=False)),
        "dims": describe_dims(m.op),
        "phase": m.phase,
        "median_s": m.median_s,
        "p10_s": m.p10_s,
        "p90_s": m.p90_s,
        "repetitions": m.repetitions,
    }


_SHORTEST_S = 1e-12
"""Shortest median of an operator that is accepted: no clock tells less."""


def _is_measured(kind: str) -> bool:
    """Whether a profile may have a kind; methods of other packages are loaded when one may be theirs."""
    if kind not in KINDS:
        all_kinds()
    return kind in KINDS and not KINDS[kind].derived


def _measurement(row: dict[str, Any], where: str) -> Measurement:
    kind, phase = row["kind"], row["phase"]
    if not _is_measured(kind):
        known = ", ".join(name for name in KINDS if _is_measured(name))
        raise UserError(f"{where}: kind = {kind!r}: expected one of {known}")
    if phase not in PHASES:
        raise UserError(f"{where}: phase = {phase!r}: expected fwd or bwd")
    dims = tuple(row[column] for column in _DIM_COLUMNS[: len(dimensions(kind))])
    if any(size is None for size in dims):
        raise UserError(f"{where}: dims = {dims}: expected {', '.join(dimensions(kind))}")
    negative = [name for name, size in zip(dimensions(kind), dims, strict=True) if size < (name != "r")]
    if negative:
        raise UserError(f"{where}: dims = {dims}: expected {', '.join(dimensions(kind))}, none below 1")
    for name in ("median_s", "p10_s", "p90_s"):
        seconds, least_s = row[name], _SHORTEST_S if name == "median_s" else 0.0
        if seconds is None or not least_s <= seconds <= MOST_SECONDS:  # nan is not, either
            expected = f"seconds above 0, and at most {MOST_SECONDS:.0f}"
            raise UserError(f"{where}: {name} = {seconds!r}: expected {expected}")
    if not (row["repetitions"] or 0) > 0:
        raise UserError(f"{where}: repetitions = {row['repetitions']!r}: expected at least 1")
    return Measurement(
        Operator(kind, dims),
        cast("Phase", phase),
        row["median_s"],
        row["p10_s"],
        row["p90_s"],
        row["repetitions"],
    )
