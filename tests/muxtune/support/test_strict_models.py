"""No field of a file takes a value of another kind: all fields of a workload, a cluster and a plan."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Annotated

import pytest
from pydantic import PrivateAttr, TypeAdapter, ValidationError

from muxtune.cluster import ClusterSpec
from muxtune.plan import Plan, load_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.support.errors import SpecError, spec_error_from
from muxtune.support.strict_models import KeyModel, StrictModel, StrictScalars
from muxtune.tasks import Workload
from tests.muxtune.tasks.test_workload import CONTENT as WORKLOAD
from tests.muxtune.test_cluster import CONTENT as CLUSTER
from tests.plans import make_plan

Path = tuple[str | int, ...]

PLAN = json.loads(make_plan().model_dump_json())


def scalars(content: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Numbers, booleans and texts with their paths; of a list, those of its first element."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from scalars(value, (*path, key))
    elif isinstance(content, list):
        for number, value in enumerate(content if len(path) and path[-1] == "schedule" else content[:1]):
            yield from scalars(value, (*path, number))
    elif content is not None:
        yield path, content


def others(value: object) -> list[object]:
    """Values of other kinds that pydantic would convert to this one's, or read as it."""
    if isinstance(value, bool):
        return [int(value), float(value), str(value), "yes" if value else "off"]
    if isinstance(value, int):
        return [True, float(value), str(value), f" {value}"]
    if isinstance(value, float):
        return [True, str(value), "1e3"]
    return [3, 1.5, False]


def with_value(content: object, path: Path, value: object) -> object:
    changed = copy.deepcopy(content)
    place = changed
    for part in path[:-1]:
        place = place[part]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    return changed


NUMBERS = {"alpha", "learning_rate", "max_grad_norm", "abort_grad_norm"}
"""Fields that a whole number is written in; they take 16 and 16.0."""

CASES = [
    pytest.param(schema, content, path, value, id=f"{schema.__name__}.{'.'.join(map(str, path))}={value!r}")
    for schema, content in ((Workload, WORKLOAD), (ClusterSpec, CLUSTER), (Plan, PLAN))
    for path, right in scalars(content)
    for value in others(right)
    if not (path[-1] in NUMBERS and type(value) is float) and path[-1] != "schema_version"
]


@pytest.mark.parametrize(("schema", "content", "path", "value"), CASES)
def test_a_value_of_another_kind_is_refused_in_every_field(schema, content, path, value):
    schema.model_validate(content)
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(with_value(content, path, value))
    assert str(path[-1]) in str(spec_error_from(caught.value, "file")) or isinstance(path[-1], int)


def test_so_many_fields_are_tried():
    assert len(CASES) > 250


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_the_version_of_a_plan_is_a_whole_number(version, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN | {"schema_version": version}))
    with pytest.raises(SpecError, match=r"schema_version = .*: expected 2, the version"):
        load_plan(path)


class Inner(StrictModel):
    counts: tuple[tuple[int, ...], ...] | None = None
    shares: dict[str, float] = {}  # noqa: RUF012  # a field of pydantic's


class Outer(StrictModel):
    inner: Inner
    either: bool | int = 0


def test_values_are_strict_at_any_depth_and_lists_stand_for_tuples():
    outer = Outer.model_validate({"inner": {"counts": [[1, 2], []], "shares": {"a": 1}}, "either": True})
    assert outer.inner.counts == ((1, 2), ())
    assert type(outer.inner.shares["a"]) is float
    assert outer.either is True
    for inner in ({"counts": [[1.0]]}, {"counts": [["1"]]}, {"counts": [[True]]}, {"shares": {"a": "1"}}):
        with pytest.raises(ValidationError):
            Outer.model_validate({"inner": inner})


@pytest.mark.parametrize("value", [True, 4.0, "4"])
def test_a_dataclass_can_be_read_as_strictly(value):
    adapter = TypeAdapter(Annotated[PlanOptions, StrictScalars()])
    assert adapter.validate_python({"tp": 4, "without": ["fusion"]}).without == ("fusion",)
    with pytest.raises(ValidationError, match="valid integer"):
        adapter.validate_python({"tp": value})


class _Key(KeyModel):
    width: int
    name: str = ""
    _note: str = PrivateAttr(default="")


def test_a_key_has_the_hash_of_its_fields_as_they_are() -> None:
    one, other = _Key(width=1), _Key(width=1)
    assert hash(one) == hash(other)
    changed = one.model_copy(update={"width": 2})
    assert hash(changed) == hash(_Key(width=2)) != hash(one)
    assert {one: "found"}[other] == "found"
    assert changed not in {one}


def test_a_hash_stays_in_its_process_and_is_no_part_of_the_content() -> None:
    key = _Key(width=1)
    hash(key)
    for again in (pickle.loads(pickle.dumps(key)), copy.copy(key), copy.deepcopy(key)):
        assert not hasattr(again, "_hash")
        assert again == key
    assert key.model_dump() == {"width": 1, "name": ""}
    with pytest.raises(ValidationError):
        key.width = 2
