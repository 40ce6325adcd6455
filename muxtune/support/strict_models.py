"""What models of files have in common: how strictly pydantic reads them.

A value of another kind is refused, never converted: ``true``, ``"6"`` and ``6.0`` are no whole numbers,
``"0.1"`` and ``true`` are no numbers, ``1`` and ``"yes"`` are no booleans. A whole number is a number. Of an
exponent (``80e9``, ``1.5e9``), the readers of YAML and JSON make a whole number where its value is one, see
:mod:`muxtune.support.numbers`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,  # JSON has neither
    use_attribute_docstrings=True,  # described once, beside the field
)

MOST_SECONDS = 1e9
"""Longest time in a plan, about thirty years: more is a slip, and sums of it would leave the floats."""

Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
"""A duration of something that is done; nothing takes no time."""

_SCALARS = {"bool", "float", "int", "str"}


def _set_strict(part: object) -> None:
    if isinstance(part, dict):
        if isinstance(part.get("type"), str) and part["type"] in _SCALARS:
            part["strict"] = True
        for inner in part.values():
            _set_strict(inner)
    elif isinstance(part, list | tuple):
        for inner in part:
            _set_strict(inner)


class StrictScalars:
    """Annotation of a type in which no number, boolean or text, however deep, is converted to another kind.

    Unlike pydantic's own strict mode, it lets a list stand for a tuple and a text for a path, as files have
    neither.
    """

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _set_strict(handler.resolve_ref_schema(schema))
        return schema


class StrictModel(BaseModel):
    """Part of a file, read strictly: no unknown field, no value of another kind, nothing infinite."""

    model_config = STRICT

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's schema of the model, with strict scalars."""
        return StrictScalars().__get_pydantic_core_schema__(source, handler)


class KeyModel(StrictModel):
    """A model that is a key of many caches, so its hash is worked out once.

    The hash is kept in a slot: pydantic copies and compares the others alone, so a changed copy, or one in
    another process, works out its own.
    """

    __slots__ = ("_hash",)

    def __hash__(self) -> int:
        """Hash of the fields; models that are equal have equal ones."""
        try:
            known: int = object.__getattribute__(self, "_hash")
        except AttributeError:
            known = hash(tuple([getattr(self, name) for name in type(self).model_fields]))
            object.__setattr__(self, "_hash", known)
        return known
