"""Complaints of pydantic in the project's own words, each mistake once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_BRANCH = re.compile(r"str|int|float|bool|none|(dict|list|tuple)\[.*|(constrained|function|is-instance)-.*")
"""Part of a location that names an alternative of a union, not a field."""

_KEY_CHARACTERS = 64

_WORDS: dict[str, str] = {
    "missing": "a value; the field is required",
    "extra_forbidden": "no such field",
    "int_type": "a valid integer",
    "int_parsing": "a valid integer",
    "int_parsing_size": "a valid integer, of fewer digits",
    "int_from_float": "a valid integer",
    "float_type": "a valid number",
    "float_parsing": "a valid number",
    "finite_number": "a finite number",
    "bool_type": "a valid boolean, true or false",
    "bool_parsing": "a valid boolean, true or false",
    "string_type": "a valid string",
    "string_unicode": "a valid string in Unicode",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "path_type": "a path",
    "list_type": "a valid list",
    "tuple_type": "a valid list",
    "set_type": "a valid list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping with fields",
    "model_attributes_type": "a mapping with fields",
    "dataclass_type": "a mapping with fields",
    "invalid_key": "fields whose names are strings",
    "recursion_loop": "a value that does not contain itself",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length}, not {actual_length}",
    "too_long": "at most {max_length}, not {actual_length}",
    "is_instance_of": "a value of the kind {class}",
    "union_tag_invalid": "one of {expected_tags}",
    "union_tag_not_found": "a value that says what kind it is",
    "json_invalid": "whole JSON",
    "json_type": "JSON",
    "value_error": "{error}",
    "assertion_error": "{error}",
}


@dataclass(frozen=True, slots=True)
class Complaint:
    """One mistake in a user's content."""

    path: str
    """Path of the field, with dots; empty for the whole."""
    value: object
    expected: str


def complaints(error: ValidationError) -> list[Complaint]:
    """Mistakes that pydantic found, in its order.

    Alternatives of a union that all do not fit are one mistake. A list that counts as too short because its
    elements are wrong is none.
    """
    found: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for each in error.errors(include_url=False):
        found.setdefault(_location(each["loc"]), []).append(each)
    inside = {location[:length] for location in found for length in range(len(location))}
    result = []
    for location, same in found.items():
        if location in inside and all(each["type"] == "too_short" for each in same):
            continue
        expected = " or ".join(dict.fromkeys(_expected(each) for each in same))
        value = None if same[0]["type"] == "missing" else same[0]["input"]
        result.append(Complaint(".".join(_shown(part) for part in location), value, expected))
    return result


def _location(parts: Sequence[int | str]) -> tuple[object, ...]:
    *before, last = parts or ("",)
    fields = [*before] if isinstance(last, str) and (not last or _BRANCH.fullmatch(last)) else [*parts]
    return tuple(part for part in fields if part != "[key]")


def _shown(part: object) -> str:
    """A key of the user, which may be anything."""
    text = str(part)
    return text if len(text) <= _KEY_CHARACTERS else f"{text[: _KEY_CHARACTERS - 3]}..."


def _expected(each: Mapping[str, Any]) -> str:
    words = _WORDS.get(each["type"], f"another kind of value ({each['type'].replace('_', ' ')})")
    if each["type"] == "string_type" and not isinstance(each["input"], list | dict | None):
        words += ", in quotes"
    text = words.format_map(each.get("ctx", {})).removeprefix("expected ")
    return text[:1].lower() + text[1:]
