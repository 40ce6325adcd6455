"""What a measuring process tells the session: a line of JSON for each thing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from muxtune.costs.profile import ClockReading, Overlap
from muxtune.graph.attention_backends import AttentionContest
from muxtune.graph.operators import Operator, Phase
from profiler.devices import Description
from profiler.load import ProcessorShare
from profiler.timing import Sample


@dataclass(frozen=True, slots=True)
class Reading:
    """What one rank measured, once."""

    op: Operator
    phase: Phase
    sample: Sample


Line = Reading | Overlap | Description | ClockReading | AttentionContest | ProcessorShare


_MODELS: dict[str, type[Overlap | Description | ClockReading | AttentionContest | ProcessorShare]] = {
    "overlap": Overlap,
    "description": Description,
    "clocks": ClockReading,
    "attention": AttentionContest,
    "share": ProcessorShare,
}


def write_line(line: Line) -> str:
    """The line as JSON, without its end."""
    if isinstance(line, Reading):
        op = {"kind": line.op.kind, "dims": line.op.dims}
        return json.dumps({"reading": {**op, "phase": line.phase, **asdict(line.sample)}})
    name = next(name for name, kind in _MODELS.items() if isinstance(line, kind))
    return json.dumps({name: line.model_dump(mode="json")})


def read_line(text: str) -> Line:
    """Inverse of :func:`write_line`."""
    ((name, content),) = json.loads(text).items()
    if name in _MODELS:
        return _MODELS[name].model_validate(content)
    op = Operator(content.pop("kind"), tuple(content.pop("dims")))
    return Reading(op, content.pop("phase"), Sample(**content))
