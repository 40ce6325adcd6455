"""The points of a sweep: numbered, checked, and recognizable when a sweep is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from experiments.sweep.fields import CombinationError
from experiments.sweep.inputs import InputReader, PointInputs
from experiments.sweep.specification import Assignments, SweepSpec
from muxtune.policies import policy_identity
from muxtune.support.errors import SpecError
from muxtune.tasks import DatasetSpec, with_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row of the result."""

    number: int
    """Number from 0, in the order of the sweep file."""
    fields: Assignments
    """What the sweep file sets for it."""
    digest: str
    """Digest of everything that its plan depends on; equal points are planned once."""
    inputs: PointInputs | None
    refused: str | None = None
    """Why its fields do not go together; then it has no inputs."""

    def __str__(self) -> str:
        return ", ".join(f"{field} = {value}" for field, value in self.fields.items())


def build_points(spec: SweepSpec, where: Path, costs_digest: str) -> list[Point]:
    """All points of a sweep.

    Args:
        spec: The sweep.
        where: File of the sweep.
        costs_digest: Digest of the operator costs that it will be planned with.

    Raises:
        UserError: A value is wrong wherever it stands, a file cannot be read, or no point can be at all.
    """
    reader = InputReader(spec, where)
    file_digest = cache(lambda dataset: with_digest(dataset).sha256)
    points: list[Point] = []
    first_error: CombinationError | None = None
    for number, fields in enumerate(spec.assignments()):
        inputs, refused = None, None
        try:
            inputs = reader.read(fields)
        except CombinationError as error:
            first_error = first_error or error
            refused = str(error)
        identity = fields if inputs is None else _identity(inputs, file_digest)
        digest = _digest([costs_digest, identity])
        points.append(Point(number=number, fields=fields, digest=digest, inputs=inputs, refused=refused))
    if first_error is not None and all(point.refused for point in points):
        raise SpecError(*first_error.args)
    return points


def _identity(inputs: PointInputs, file_digest: Callable[[DatasetSpec], str | None]) -> dict[str, object]:
    return {
        "workload": inputs.workload.model_dump(mode="json"),
        "datasets": [file_digest(task.dataset) for task in inputs.workload.tasks],
        "model": inputs.model.model_dump(mode="json"),
        "cluster": inputs.cluster.model_dump(mode="json"),
        "policy": policy_identity(inputs.policy),
        "options": asdict(inputs.options),
    }


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
