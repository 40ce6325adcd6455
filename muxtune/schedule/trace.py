"""Timelines, simulated or measured, in one vocabulary and one file format (Chrome/Perfetto JSON)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nextafter
from pathlib import Path
from typing import NamedTuple

from muxtune.schedule.actions import Action
from muxtune.support.errors import UserError
from muxtune.support.files import write_text_atomically

COMPUTE = "compute"
COMMUNICATION = "communication"


@dataclass(frozen=True, slots=True)
class ActionSpan:
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


class OperatorSpan(NamedTuple):
    """An operator that a stage executed as part of an action; a tuple, for there are very many."""

    stage: int
    stream: str
    """``compute`` or ``communication``."""
    action: Action
    label: str
    """Name for people: the operator's kind, and of an adapter its task."""
    role: str
    """See :data:`muxtune.graph.Role`."""
    start_s: float
    end_s: float


def track_name(stage: int, stream: str) -> str:
    """Name of a track; the same for simulator and runtime."""
    return f"stage {stage} {stream}"


_STREAMS = (COMPUTE, COMMUNICATION)

_OPERATOR = "operator"
"""Category of the events that lie inside or beside those of actions."""


def to_chrome(
    spans: Iterable[ActionSpan], process: str, operators: Iterable[OperatorSpan] = ()
) -> dict[str, object]:
    """Chrome trace-event JSON: one thread per stage and stream, complete events, microseconds.

    Viewers draw the events of a thread as a stack and drop what is neither inside nor beside the others.
    Times are therefore whole nanoseconds, which is what Perfetto counts in, and parents come first. What a
    stream really did at once, such as transfers in two directions, gets a second thread of the same name.

    Args:
        spans: Actions and transfers.
        process: Name over all tracks.
        operators: What they consist of; those that take no nanosecond are left out.
    """
    inner = (_operator_event(span) for span in operators)
    events = [_action_event(span) for span in spans] + [e for e in inner if e.end_ns > e.start_ns]
    events.sort(key=_order)
    stages = 1 + max((event.stage for event in events), default=0)
    open_until: dict[int, list[int]] = {}  # thread -> ends of the events around the next one, outermost first
    metadata: list[dict[str, object]] = [_metadata("process_name", 0, process)]
    body: list[dict[str, object]] = []
    for event in events:
        thread = 2 * event.stage + _STREAMS.index(event.stream)
        while not _nests(open_until.get(thread, []), event):
            thread += 2 * stages
        if thread not in open_until:
            open_until[thread] = []
            metadata.append(_metadata("thread_name", thread, track_name(event.stage, event.stream)))
        open_until[thread].append(event.end_ns)
        body.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.category,
                "pid": 0,
                "tid": thread,
                "ts": _microseconds(event.start_ns),
                "dur": _microseconds(event.end_ns - event.start_ns),
                "args": event.args,
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": metadata + body}


def save_trace(
    path: Path, spans: Iterable[ActionSpan], process: str, operators: Iterable[OperatorSpan] = ()
) -> None:
    """Write a trace that chrome://tracing and ui.perfetto.dev open; arguments as in :func:`to_chrome`."""
    write_text_atomically(path, json.dumps(to_chrome(spans, process, operators)))


def load_trace(path: Path) -> list[ActionSpan]:
    """Read the actions and transfers of a trace that :func:`save_trace` wrote.

    Raises:
        UserError: Missing or not such a file.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        tracks = {
            e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"
        }
        return [_span(e, tracks) for e in events if e["ph"] == "X" and e.get("cat") != _OPERATOR]
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a trace of ours: {error}") from error


def _span(event: Mapping[str, object], tracks: Mapping[object, str]) -> ActionSpan:
    name = tracks.get(event["tid"], "")
    match = re.fullmatch(rf"stage (\d+) ({COMPUTE}|{COMMUNICATION})", name)
    if match is None:
        raise ValueError(f"no track of ours is named {name!r}")
    start_s = float(str(event["ts"])) / 1e6
    end_s = start_s + float(str(event["dur"])) / 1e6
    return ActionSpan(int(match[1]), match[2], Action.parse(str(event["name"])), start_s, end_s)


class _Event(NamedTuple):
    """A complete event before it has a thread."""

    stage: int
    stream: str
    start_ns: int
    end_ns: int
    name: str
    category: str
    args: dict[str, object]


def _action_event(span: ActionSpan) -> _Event:
    a = span.action
    args: dict[str, object] = {"htask": a.htask, "number": a.number}
    return _Event(span.stage, span.stream, _ns(span.start_s), _ns(span.end_s), str(a), a.kind, args)


def _operator_event(span: OperatorSpan) -> _Event:
    args: dict[str, object] = {"action": str(span.action), "role": span.role}
    start_ns, end_ns = _ns(span.start_s), _ns(span.end_s)
    return _Event(span.stage, span.stream, start_ns, end_ns, span.label, _OPERATOR, args)


def _order(event: _Event) -> tuple[int, int, bool, bool, int]:
    """Sort key: start; of equals, actions before operators, and what has no length before the others."""
    length_ns = event.end_ns - event.start_ns
    return event.start_ns, event.stage, event.category == _OPERATOR, length_ns > 0, -length_ns


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _nests(ends_ns: list[int], event: _Event) -> bool:
    """Whether an event has its place on a thread; closes what has ended there.

    Operators lie inside actions, and actions of one clock inside each other. Of what communicates, nothing is
    part of anything else.
    """
    while ends_ns and ends_ns[-1] <= event.start_ns:
        ends_ns.pop()
    return not ends_ns or (event.stream == COMPUTE and event.end_ns <= ends_ns[-1])


def _microseconds(ns: int) -> float:
    """Whole nanoseconds again, whether a reader cuts or rounds a thousand times the number."""
    us = ns / 1e3
    return us if int(us * 1e3) == ns else nextafter(us, inf)


def _metadata(kind: str, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": thread, "args": {"name": name}}


def iteration_ends_s(spans: Sequence[ActionSpan]) -> list[float]:
    """When each iteration is complete: the last STEP with its number on any stage has ended."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.action.kind == "STEP":
            ends[span.action.number] = max(ends.get(span.action.number, 0.0), span.end_s)
    return [ends[k] for k in sorted(ends)]
