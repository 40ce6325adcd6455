"""Rows of a sweep as a Parquet file: one per point, in their order.

Columns: the point's number; every field that the sweep sets, under its path (null where a point does not set
it, JSON where its values have no common column type); names and sizes; then the outcome. A plan's
``predicted`` stands there key by key, with lists per stage and hTask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from experiments.sweep.journal import Finished
from experiments.sweep.points import Point
from muxtune.plan import Predicted
from muxtune.support.errors import UserError
from muxtune.support.files import write_atomically
from muxtune.support.user_files import check_regular

_DIGEST = "point_digest"
_TEXT, _INTEGER, _NUMBER = pa.string(), pa.int64(), pa.float64()
_SCALARS = {bool: pa.bool_(), int: _INTEGER, float: _NUMBER, str: _TEXT}
_INTEGER_LIMIT = 2**63

_OF_POINT = {
    "point": _INTEGER,
    "policy": _TEXT,
    "model_name": _TEXT,
    "cluster_name": _TEXT,
    "ranks": _INTEGER,
    "tasks": _INTEGER,
    _DIGEST: _TEXT,
}
_OF_OUTCOME = {
    "status": _TEXT,
    "failure": _TEXT,
    "template": _TEXT,
    "tp": _INTEGER,
    "pp": _INTEGER,
    "dp": _INTEGER,
    "layers_per_stage": pa.list_(_INTEGER),
    "htasks": _INTEGER,
    "partition": _TEXT,
    "alignments": pa.list_(_TEXT),
    "buckets": pa.list_(pa.list_(_INTEGER)),
    "costs": _TEXT,
    "costs_kind": _TEXT,
    "plan_digest": _TEXT,
    "planning_s": _NUMBER,
    "max_peak_memory_bytes": _INTEGER,
}


def save_rows(path: Path, points: Sequence[Point], finished: Finished) -> None:
    """Write the rows; the file is whole or absent.

    Args:
        path: Parquet.
        points: Points of the sweep.
        finished: An outcome for each.
    """
    columns: dict[str, pa.Array] = {"point": pa.array([point.number for point in points], _INTEGER)}
    for field in dict.fromkeys(field for point in points for field in point.fields):
        if field in _OF_POINT:  # policy: its column has a value for every point
            continue
        columns[field] = _field_column([point.fields.get(field) for point in points])
    names = [_names(point) for point in points]
    for name, kind in _OF_POINT.items():
        columns[name] = pa.array([row.get(name) for row in names], kind)
    outcomes = [finished[point.digest] for point in points]
    for name, kind in outcome_types().items():
        columns[name] = pa.array([outcome.get(name) for outcome in outcomes], kind)
    write_atomically(path, lambda temporary: pq.write_table(pa.table(columns), temporary))


def load_finished(path: Path) -> Finished:
    """Outcomes that a whole result has, by the digests of their points.

    Raises:
        UserError: It is no result of a sweep.
    """
    names = [_DIGEST, *outcome_types()]
    check_regular(path, "the result")
    try:
        rows = pq.read_table(path, columns=names).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is not the result of a sweep: {' '.join(str(error).split())}") from error
    if rows and len(rows[0]) < len(names):
        raise UserError(f"{path} is not the result of a sweep of this version: it lacks columns")
    return {str(row.pop(_DIGEST)): row for row in rows}


def outcome_types() -> dict[str, pa.DataType]:
    """Columns of outcomes."""
    predicted = {name: _arrow_type(field.annotation) for name, field in Predicted.model_fields.items()}
    return _OF_OUTCOME | predicted


def _arrow_type(annotation: object) -> pa.DataType:
    if get_origin(annotation) is tuple:
        return pa.list_(_arrow_type(get_args(annotation)[0]))
    if get_origin(annotation) is Literal:
        return _TEXT
    present = [a for a in get_args(annotation) if a is not type(None)]  # of ``int | None``
    kind = present[0] if present else annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return pa.struct([(n, _arrow_type(field.annotation)) for n, field in kind.model_fields.items()])
    return _SCALARS[kind]  # type: ignore[index]


def _names(point: Point) -> dict[str, object]:
    found: dict[str, object] = {"point": point.number, _DIGEST: point.digest}
    if point.inputs is None:
        return found | {"policy": point.fields.get("policy")}
    return found | {
        "policy": point.inputs.policy,
        "model_name": point.inputs.model.name,
        "cluster_name": point.inputs.cluster.name,
        "ranks": point.inputs.cluster.ranks,
        "tasks": len(point.inputs.workload.tasks),
    }


def _field_column(values: Sequence[object]) -> pa.Array:
    """Numbers or texts as such; anything else, and mixtures, as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        kinds = {float}
    too_large = any(isinstance(v, int) and abs(v) >= _INTEGER_LIMIT for v in values)
    if len(kinds) == 1 and not too_large and (kind := kinds.pop()) in _SCALARS:
        return pa.array(values, _SCALARS[kind])
    return pa.array([None if value is None else json.dumps(value) for value in values], _TEXT)
