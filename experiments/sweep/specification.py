"""The sweep file: a base, and the fields that its points give other values.

The points of ``grid`` come first, its last field running fastest; those of ``list`` follow. A key of the grid
may name several fields with commas between them, which then change together; its values are lists as long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from experiments.sweep.fields import Part, Selector, parse_field
from muxtune.support.errors import SpecError, naming, spec_error_from
from muxtune.support.strict_models import StrictModel
from muxtune.support.yaml_file import load_yaml

ROOTS = ("workload", "model", "cluster", "policy", "options")
"""First parts of all fields."""

Assignments = dict[str, object]
"""Fields of a point with their values, in the order in which they are set."""


class SweepSpec(StrictModel):
    """A sweep file, as it is written."""

    workload: str | dict[str, Any] | None = Field(default=None, union_mode="left_to_right")
    """Path of a workload file, its content, or ``{random: SEED}``; ``count`` sets the number of tasks."""
    model: str | dict[str, Any] | None = None
    """Preset, Hugging Face directory or all fields of a backbone; the workload's backbone by default."""
    cluster: str | dict[str, Any] | None = None
    """Preset, path of a cluster file or its content."""
    policy: str = "muxtune"
    options: dict[str, Any] = Field(default={})
    """Decisions that are taken away from the policy: fields of ``PlanOptions``."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values of each field; all combinations are points."""
    points: tuple[dict[str, Any], ...] = Field(default=(), alias="list")
    """Points by themselves: field -> value."""

    @cached_property
    def base(self) -> dict[str, object]:
        """What a point has where it sets nothing."""
        return self.model_dump(include=set(ROOTS))

    @cached_property
    def fields(self) -> dict[str, tuple[Part, ...]]:
        """All fields that points set, in the order of the file, with their parts."""
        named = [field for key in self.grid for field in _split(key)]
        named += [field for point in self.points for field in point]
        return {field: parse_field(field) for field in named}

    def assignments(self) -> Iterator[Assignments]:
        """Assignments of every point, in the order of the points."""
        if self.grid:
            axes = [[_together(key, value) for value in values] for key, values in self.grid.items()]
            for combination in product(*axes):
                yield {field: value for changes in combination for field, value in changes.items()}
        for point in self.points:
            yield dict(point)


def load_sweep(path: Path) -> SweepSpec:
    """Read and check a sweep file.

    Raises:
        UserError: It is missing, not YAML, or a field is wrong; the message names it.
    """
    content = load_yaml(path, "the sweep")
    if not isinstance(content, dict):
        raise SpecError(str(path), content, "a mapping with the key grid or list")
    try:
        spec = SweepSpec.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    with naming(str(path)):
        _check(spec)
    return spec


def _check(spec: SweepSpec) -> None:
    if not spec.grid and not spec.points:
        raise SpecError("grid", None, "fields with lists of values, or points under list")
    seen: set[str] = set()
    for key, values in spec.grid.items():
        where = f"grid.{key}"
        if not values:
            raise SpecError(where, values, "at least one value")
        fields = _split(key)
        for field in fields:
            _check_field(field, where)
            if field in seen:
                raise SpecError(where, field, "every field once")
            seen.add(field)
        for value in values:
            if len(fields) > 1 and not (isinstance(value, list) and len(value) == len(fields)):
                raise SpecError(where, value, f"a list of {len(fields)} values, one per field")
            _check_value(value, where)
    for number, point in enumerate(spec.points):
        for field, value in point.items():
            _check_field(field, f"list[{number}]")
            _check_value(value, f"list[{number}].{field}")


def _check_field(field: str, where: str) -> None:
    with naming(where):
        root, *others = parse_field(field)
    assert not isinstance(root, Selector)  # parse_field refuses that
    if root not in ROOTS:
        raise SpecError(where, field, f"policy, or a field of {', '.join(r for r in ROOTS if r != 'policy')}")
    if root == "policy" and others:
        raise SpecError(where, field, "policy alone: it is a name")


def _check_value(value: object, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecError(where, value, f"numbers, texts, lists and mappings ({error})") from error


def _split(key: str) -> list[str]:
    return [field.strip() for field in key.split(",")]


def _together(key: str, value: object) -> Assignments:
    fields = _split(key)
    if len(fields) == 1:
        return {fields[0]: value}
    assert isinstance(value, list)  # checked when the file was loaded
    return dict(zip(fields, value, strict=True))
