"""What a tenant says of its PEFT method in a workload file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from muxtune.model import ALL_LINEAR, MOST_LAYERS, ModelSpec
from muxtune.support.errors import SpecError
from muxtune.support.strict_models import KeyModel

LARGEST_FACTOR = 1e6
"""Largest factor of any kind; single precision ends at 3e38."""
MOST_VIRTUAL_TOKENS = 1 << 16
"""Most tokens that a method puts in front of sequences; a backbone's positions are fewer."""


class PeftSpec(KeyModel):
    """Parameters of one method, which its class fixes in ``method``."""

    method: str
    """Name of the method."""
    init: Path | None = None
    """Folder of a saved adapter, in peft's format, that the task starts from; relative to the workload file.
    By default it starts from values that its seed gives."""
    init_sha256: str | None = None
    """Digest of that folder when the plan was made; a changed one is refused."""

    quiet: ClassVar[frozenset[str]] = frozenset({"init", "init_sha256"})
    """Fields that are not written where they have their defaults."""

    @property
    def drops(self) -> bool:
        """Whether it has dropout, whose masks depend on the task's seed."""
        return False

    @property
    def kinked(self) -> bool:
        """Whether what it computes has a kink, as ReLU has: rounding there makes gradients come or go."""
        return False

    @property
    def starts_from_weights(self) -> bool:
        """Whether its first values depend on the weights of the backbone's linears that it adapts."""
        return False

    @model_serializer(mode="wrap")
    def _without_quiet_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = handler(self)
        fields = type(self).model_fields
        quiet = {name for name in self.quiet if getattr(self, name) == fields[name].default}
        return {name: value for name, value in content.items() if name not in quiet}


def _layer_numbers(value: object) -> object:
    """Numbers and ranges, as ``[0, 1, 30-31]``."""
    if not isinstance(value, list | tuple):
        return value
    numbers: set[int] = set()
    for each in value:
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", str(each))
        if found is None or isinstance(each, bool):
            raise ValueError("expected numbers and ranges of layers, as [0, 1, 30-31]")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < MOST_LAYERS:
            raise ValueError(f"expected ascending ranges of layers below {MOST_LAYERS}, as 30-31")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


class LayeredSpec(PeftSpec):
    """Parameters of a method that can be attached to some layers alone."""

    layers: Annotated[tuple[int, ...], BeforeValidator(_layer_numbers), Field(min_length=1)] | None = None
    """Layers from 0 that are adapted, as PEFT's ``layers_to_transform``; all by default."""

    quiet = PeftSpec.quiet | {"layers"}

    def has_layer(self, layer: int) -> bool:
        """Whether it is attached to a layer."""
        return self.layers is None or layer in self.layers

    def check_layers(self, model: ModelSpec, where: str) -> None:
        """Refuse layers that a backbone does not have (``SpecError``)."""
        if self.layers is not None and self.layers[-1] >= model.layers:
            expected = f"layers from 0 to {model.layers - 1} of {model.name}"
            raise SpecError(f"{where}.layers", self.layers[-1], expected)


def _target_names(value: object) -> object:
    """``all-linear`` as text, as peft has it; any other text is refused with the list that may be meant.

    In peft, text is a regular expression, and a comma list matches nothing.
    """
    if not isinstance(value, str):
        return value
    if value.strip() == ALL_LINEAR:
        return (ALL_LINEAR,)
    names = re.split(r"[\s,]+", value.strip(" ,[]"))
    if all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names):
        raise ValueError(f"expected a list, as [{', '.join(names)}], or all-linear")
    raise ValueError("expected a list of names, as [q_proj, v_proj], or all-linear; no regular expression")


ModuleNames = Annotated[tuple[str, ...], BeforeValidator(_target_names)]
"""Module names as in PEFT's lists of modules."""

Targets = Annotated[ModuleNames, Field(min_length=1)]
"""Module names as in PEFT's ``target_modules``, or ``all-linear`` alone, which may be written as text."""
