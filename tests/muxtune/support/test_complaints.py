"""No word of pydantic's reaches a user: every error that our models can raise has words of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core._pydantic_core import list_all_errors  # there is no public list

from experiments.sweep.specification import SweepSpec
from muxtune.cluster import ClusterSpec
from muxtune.costs.profile import Overlaps, Provenance
from muxtune.model import BackboneDigest
from muxtune.plan import Plan
from muxtune.plan.by_hand import HandDecisions
from muxtune.support.complaints import complaints
from muxtune.support.errors import spec_error_from
from muxtune.tasks import Workload
from runtime.reports.report import RunReport
from runtime.tasks.checkpoint_files import Header

MODELS: tuple[type[BaseModel], ...] = (
    Plan,
    HandDecisions,
    Workload,
    ClusterSpec,
    SweepSpec,
    Provenance,
    Overlaps,
    BackboneDigest,
    RunReport,
    Header,
)
"""What is read from files."""

ERRORS = {
    "any": (),
    "bool": ("bool_type", "bool_parsing"),
    "chain": (),
    "date": ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
    "datetime": ("datetime_type", "datetime_parsing", "datetime_from_date_parsing"),
    "default": (),
    "definition-ref": ("recursion_loop",),
    "definitions": (),
    "dict": ("dict_type", "invalid_key"),
    "float": ("float_type", "float_parsing", "finite_number"),
    "function-after": ("value_error", "assertion_error"),
    "function-before": ("value_error", "assertion_error"),
    "function-plain": ("value_error", "assertion_error"),
    "function-wrap": ("value_error", "assertion_error"),
    "int": ("int_type", "int_parsing", "int_parsing_size", "int_from_float"),
    "is-instance": ("is_instance_of",),
    "json-or-python": (),
    "lax-or-strict": ("path_type",),
    "list": ("list_type",),
    "literal": ("literal_error",),
    "model": ("model_type", "model_attributes_type", "json_invalid", "json_type"),
    "model-fields": ("model_type", "missing", "extra_forbidden", "invalid_key"),
    "none": ("none_required",),
    "nullable": (),
    "set": ("set_type",),
    "str": ("string_type", "string_unicode"),
    "tagged-union": ("union_tag_invalid", "union_tag_not_found"),
    "tuple": ("tuple_type",),
    "union": (),
}
"""What each kind of schema can complain about. A kind that is missing here fails the test: look it up."""

CONSTRAINTS = {
    "gt": "greater_than",
    "ge": "greater_than_equal",
    "lt": "less_than",
    "le": "less_than_equal",
    "multiple_of": "multiple_of",
    "pattern": "string_pattern_mismatch",
}
SIZES = {
    ("str", "min_length"): "string_too_short",
    ("str", "max_length"): "string_too_long",
    ("tuple", "min_length"): "too_short",
    ("tuple", "max_length"): "too_long",
    ("list", "min_length"): "too_short",
    ("list", "max_length"): "too_long",
    ("dict", "min_length"): "too_short",
    ("dict", "max_length"): "too_long",
}
CONTEXTS = {each["type"]: each.get("example_context") for each in list_all_errors()}


_NO_SCHEMAS = {"model-field", "to-string", "with-info", "no-info"}


def schemas(part: object) -> Iterator[dict[str, object]]:
    """Schemas inside of a schema, itself included; entries that hold no schema are passed over."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str) and part["type"] not in _NO_SCHEMAS:
            yield part
        for name, inner in part.items():
            if name not in {"metadata", "serialization", "ref", "default", "config", "expected"}:
                yield from schemas(inner)
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from schemas(inner)


def reachable(model: type[BaseModel]) -> set[str]:
    """Types of errors that validating the model can raise."""
    found: set[str] = set()
    for schema in schemas(model.__pydantic_core_schema__):
        kind = schema["type"]
        assert kind in ERRORS, f"{model.__name__}: what can a {kind} complain about?"
        found |= set(ERRORS[kind])
        found |= {error for name, error in CONSTRAINTS.items() if schema.get(name) is not None}
        found |= {error for (of, name), error in SIZES.items() if of == kind and schema.get(name) is not None}
        if kind == "tuple" and "variadic_item_index" not in schema:
            found |= {"missing", "too_long"}  # of a fixed number of entries
    return found


ALL = sorted(set().union(*(reachable(model) for model in MODELS)))


def test_the_walk_finds_what_is_there():
    assert {"too_short", "greater_than", "literal_error", "missing", "extra_forbidden", "path_type"} <= set(
        ALL
    )
    assert "union_tag_invalid" in ALL


@pytest.mark.parametrize("kind", ALL)
def test_every_error_of_our_models_has_words_of_our_own(kind):
    made = InitErrorDetails(type=kind, loc=("field",), input=[], ctx=CONTEXTS.get(kind) or {})
    if kind == "path_type":  # raised by pydantic's Python part
        made["type"] = PydanticCustomError("path_type", "Input is not a valid path")
    elif kind in {"value_error", "assertion_error"}:  # the words are those of the validator
        made["ctx"] = {"error": ValueError("expected our own words")}
    error = ValidationError.from_exception_data("Made", [made])
    message = error.errors()[0]["msg"]
    (complaint,) = complaints(error)
    assert "another kind of value" not in complaint.expected
    assert "{" not in complaint.expected
    assert complaint.expected.lower() != message.lower()
    for words in ("Input should", "should have at least", "Field required", "Extra inputs"):
        assert words.lower() not in complaint.expected.lower()


@pytest.mark.parametrize(
    ("model", "content", "message"),
    [
        (HandDecisions, {"workload": "w", "buckets": []}, "f: buckets = []: expected at least 1, not 0"),
        (HandDecisions, {"workload": 1.5}, "f: workload = 1.5: expected a path"),
        (HandDecisions, {}, "f: workload = None: expected a value; the field is required"),
        (Workload, {"tasks": []}, "f: tasks = []: expected at least 1, not 0"),
    ],
    ids=["empty", "path", "missing", "tasks"],
)
def test_what_a_user_sees(model, content, message):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(content)
    assert str(spec_error_from(caught.value, "f")) == message


def test_a_report_that_is_no_json_is_told_so():
    with pytest.raises(ValidationError) as caught:
        RunReport.model_validate_json("{")
    assert str(spec_error_from(caught.value, "run.json")) == "run.json = '{': expected whole JSON"
