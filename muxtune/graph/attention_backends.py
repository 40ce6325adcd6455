"""Attention backends by name, and the contest that chooses one for a device by measurement.

A suite of operators that has several backends implements :class:`AttentionSuite`; the profiler times them
on :func:`contest_streams`. The profile keeps the :class:`AttentionContest`, which a plan's choice comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean
from typing import Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from muxtune.batches import batched_calls
from muxtune.graph.operators import OperatorSuite, Phase
from muxtune.model import ModelSpec

AttentionName = Literal["grouped", "loop", "varlen", "flex", "masked"]
"""How attention inside the sequences of a stream is computed (``runtime.attention`` describes each)."""

DEFAULT_ATTENTION: AttentionName = "grouped"
"""Runs on every device, and is what the others have to beat."""


def kept_calls(row_tokens: Sequence[int], attention: AttentionName) -> list[tuple[int, int]]:
    """What a backend keeps of rows of these lengths for the backward, as (sequences, slots of a row).

    Masks come on top: under ``masked``, one of the whole stream, and under ``flex`` one by blocks.
    """
    if attention == "grouped":
        return batched_calls(row_tokens)
    if attention == "loop":
        return [(1, tokens) for tokens in row_tokens]
    return [(1, sum(row_tokens))] if row_tokens else []


MARGIN = 0.05
"""Share of time by which another backend has to be faster: with less, the same machine would choose
differently from one time to the next."""


class AttentionTime(BaseModel):
    """What one backend took for a stream, or why it was not tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: AttentionName
    fwd_s: tuple[float, ...] = ()
    """Median of each stream, in their order; empty if it was not tried."""
    bwd_s: tuple[float, ...] = ()
    missing: str | None = None
    """What it needs and does not have here; None if it was tried."""

    @property
    def seconds(self) -> list[float]:
        """Forward and backward of each stream."""
        return [forward + backward for forward, backward in zip(self.fwd_s, self.bwd_s, strict=True)]


class AttentionContest(BaseModel):
    """Backends of one device, timed on the same streams."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    streams: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Lengths of the sequences of each."""
    times: tuple[AttentionTime, ...] = Field(min_length=1)
    """Times of every backend."""
    chosen: AttentionName

    def ratio(self, backend: AttentionName) -> float | None:
        """Geometric mean over the streams of its time relative to the default's; None if it was not tried."""
        seconds = {each.backend: each.seconds for each in self.times if each.missing is None}
        return _ratio(seconds, backend) if backend in seconds else None


def choose_attention(seconds: Mapping[AttentionName, Sequence[float]]) -> AttentionName:
    """The fastest backend on the whole; the default unless another is faster by more than :data:`MARGIN`.

    Args:
        seconds: Seconds of each stream, by backend. A stream weighs as much as any other, however long it
            takes.
    """
    fastest = min(seconds, key=lambda name: _ratio(seconds, name))
    return fastest if _ratio(seconds, fastest) < 1 - MARGIN else DEFAULT_ATTENTION


def _ratio(seconds: Mapping[AttentionName, Sequence[float]], name: AttentionName) -> float:
    pairs = zip(seconds[name], seconds[DEFAULT_ATTENTION], strict=True)
    return geometric_mean(own / default for own, default in pairs)


def contest_streams(longest: int) -> tuple[tuple[int, ...], ...]:
    """Lengths of the sequences of the contest's streams: many short, equal, mixed ones, and one long one.

    Args:
        longest: Longest sequence that the backbone has positions for.
    """
    short = _spread(24, 8, 40)
    mixed = _spread(10, 16, 256)
    streams = (short, (64,) * 16, mixed, (1024,))
    return tuple(tuple(min(length, longest) for length in each) for each in streams)


def _spread(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Evenly from one to the other, each half of the stream with long and short ones."""
    lengths = [shortest + (longest - shortest) * i // (count - 1) for i in range(count)]
    return (*lengths[::2], *lengths[1::2])


@runtime_checkable
class AttentionSuite(OperatorSuite, Protocol):
    """A suite of operators that can compute attention in several ways."""

    def attention_needs(self, model: ModelSpec, device: str) -> Mapping[AttentionName, str | None]:
        """What each backend needs and does not have there; None for those that a run may use."""
        ...

    def with_attention(self, backend: AttentionName) -> Self:
        """This suite, with attention by that backend."""
        ...

    def build_attention(
        self, lengths: Sequence[int], model: ModelSpec, device: str
    ) -> dict[Phase, Callable[[], object]]:
        """Attention of one stream of sequences, forward and backward; the latter may be called repeatedly."""
        ...
