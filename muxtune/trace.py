"""Timelines, simulated or measured, in one vocabulary and one file format (Chrome/Perfetto JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from muxtune.errors import UserError
from muxtune.files import write_text_atomically
from muxtune.schedule import Action

COMPUTE = "compute"
COMMUNICATION = "communication"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a stage did from ``start_s`` to ``end_s`` (seconds from the start of the run)."""

    stage: int
    stream: str
    """``compute`` or ``communication``."""
    action: Action
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s


def track_name(stage: int, stream: str) -> str:
    """Name of a track; the same for simulator and runtime."""
    return f"stage {stage} {stream}"


_STREAMS = (COMPUTE, COMMUNICATION)


def to_chrome(spans: Iterable[Span], process: str) -> dict[str, object]:
    """Chrome trace-event JSON: one thread per stage and stream, complete events, microseconds."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": process}}
    ]
    body: list[dict[str, object]] = []
    seen: set[int] = set()
    for span in sorted(spans, key=lambda s: (s.start_s, s.stage)):
        thread = 2 * span.stage + _STREAMS.index(span.stream)
        if thread not in seen:
            seen.add(thread)
            name = track_name(span.stage, span.stream)
            events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": thread, "args": {"name": name}})
        a = span.action
        body.append(
            {
                "ph": "X",
                "name": str(a),
                "cat": a.kind,
                "pid": 0,
                "tid": thread,
                "ts": span.start_s * 1e6,
                "dur": span.duration_s * 1e6,
                "args": {"htask": a.htask, "number": a.number},
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": events + body}


def save_trace(path: Path, spans: Iterable[Span], process: str) -> None:
    """Write a trace that chrome://tracing and ui.perfetto.dev open."""
    write_text_atomically(path, json.dumps(to_chrome(spans, process)))


def load_trace(path: Path) -> list[Span]:
    """Read a trace that :func:`save_trace` wrote.

    Raises:
        UserError: Missing or not such a file.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        return [_span(event) for event in events if event["ph"] == "X"]
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a trace of ours: {error}") from error


def _span(event: dict[str, object]) -> Span:
    stage, stream = divmod(int(str(event["tid"])), 2)
    start_s = float(str(event["ts"])) / 1e6
    end_s = start_s + float(str(event["dur"])) / 1e6
    return Span(stage, _STREAMS[stream], Action.parse(str(event["name"])), start_s, end_s)


def iteration_ends_s(spans: Sequence[Span]) -> list[float]:
    """When each iteration is complete: the last STEP with its number on any stage has ended."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.action.kind == "STEP":
            ends[span.action.number] = max(ends.get(span.action.number, 0.0), span.end_s)
    return [ends[k] for k in sorted(ends)]
