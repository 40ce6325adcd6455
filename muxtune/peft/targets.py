"""Which linears of a backbone a task adapts: peft's rules for ``target_modules`` and ``exclude_modules``.

Peft compares with a module's whole path, such as ``model.layers.0.self_attn.q_proj``: names of a list are the
path or its end behind a dot, a text is one regular expression that matches the path from end to end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Self

from pydantic import BeforeValidator, WithJsonSchema, model_validator

from muxtune.model import ALL_LINEAR, FAMILIES, ModelSpec
from muxtune.peft.spec import LayeredSpec
from muxtune.support.errors import SpecError

Selection = tuple[str, ...] | str
"""Names, or one regular expression."""


def _selection(value: object) -> object:
    """A list of names, or a regular expression; ``all-linear`` as text, as peft has it."""
    if isinstance(value, str):
        text = value.strip()
        if text == ALL_LINEAR:
            return (ALL_LINEAR,)
        names = re.split(r"[\s,]+", text.strip(" ,[]"))
        if all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names):
            # As an expression it could match no path, which has dots.
            raise ValueError(f"expected a list, as [{', '.join(names)}], or all-linear")
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from error
        return text
    if not isinstance(value, list | tuple):
        raise ValueError("expected a valid list of names, one regular expression as text, or all-linear")
    if not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("expected a list of at least one name, as [q_proj, v_proj]")
    return tuple(value)


def _nothing_saved(value: object) -> None:
    if value is not None and value not in ([], ()):
        raise ValueError("expected null: the backbone is shared, so none of its modules is trained whole")


_SELECTED = {"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "string"}]}


class TargetedSpec(LayeredSpec):
    """Parameters of a method that adapts linears which a tenant names."""

    targets: Annotated[Selection, BeforeValidator(_selection), WithJsonSchema(_SELECTED)]
    """Linears that are adapted, as peft's ``target_modules``: names, or one regular expression as text, or
    ``all-linear``."""
    exclude_modules: Annotated[Selection, BeforeValidator(_selection), WithJsonSchema(_SELECTED)] | None = (
        None
    )
    """Linears that are not, of those; written alike."""
    modules_to_save: Annotated[None, BeforeValidator(_nothing_saved)] = None
    """Refused: modules of the backbone that peft would train whole."""

    quiet = LayeredSpec.quiet | {"exclude_modules", "modules_to_save"}

    @model_validator(mode="after")
    def _no_layers_beside_an_expression(self) -> Self:
        if isinstance(self.targets, str) and self.layers is not None:
            raise ValueError("expected the layers inside of the regular expression in targets, as in peft")
        return self

    def check_targets(self, model: ModelSpec, where: str) -> None:
        """Refuse targets and exclusions that match nothing, or what is no linear of a layer (``SpecError``).

        They would silently train nothing, or something else than is meant.
        """
        self.check_layers(model, where)
        _check_matches(self, model, where)
        if not any(targeted_paths(self, model)):
            if not self.exclude_modules:
                expected = f"a layer of {model.name} with such a target"
                raise SpecError(f"{where}.layers", self.layers, expected)
            expected = f"some of the linears that targets match in {model.name} left"
            raise SpecError(f"{where}.exclude_modules", self.exclude_modules, expected)


def module_path(model: ModelSpec, layer: int, path: str) -> str:
    """Path of a module of a layer in the backbone, as Hugging Face names it."""
    return f"{model.layer_prefix}.{layer}.{path}"


def targeted_paths(spec: TargetedSpec, model: ModelSpec) -> tuple[frozenset[str], ...]:
    """For each layer the paths, inside it, of the linears that are adapted."""
    return _targeted(spec.targets, spec.exclude_modules, spec.layers, model)


@lru_cache(maxsize=4096)
def _targeted(
    targets: Selection, excluded: Selection | None, layers: tuple[int, ...] | None, model: ModelSpec
) -> tuple[frozenset[str], ...]:
    def has(layer: int, name: str) -> bool:
        path = module_path(model, layer, name)
        if excluded is not None and _selects(excluded, path):
            return False
        if targets != (ALL_LINEAR,) and path in targets and not isinstance(targets, str):
            return True  # in peft, a whole path counts whatever the layers
        return (layers is None or layer in layers) and _selects(targets, path)

    names = [linear.name for linear in model.linears]
    return tuple(frozenset(name for name in names if has(layer, name)) for layer in range(model.layers))


def _selects(selection: Selection, path: str) -> bool:
    if selection == (ALL_LINEAR,):
        return True
    if isinstance(selection, str):
        return re.fullmatch(selection, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in selection)


def _check_matches(spec: TargetedSpec, model: ModelSpec, where: str) -> None:
    known = ", ".join(dict.fromkeys(linear.name.rsplit(".", 1)[-1] for linear in model.linears))
    paths = [
        module_path(model, layer, linear.name) for layer in range(model.layers) for linear in model.linears
    ]
    others = list(_other_modules(model))
    # What is excluded may be what a regular expression in targets must not match.
    for field, selection, among in (
        ("targets", spec.targets, paths),
        ("exclude_modules", spec.exclude_modules, paths + others),
    ):
        if isinstance(selection, str):
            if not any(_selects(selection, path) for path in among):
                expected = (
                    f"a regular expression that matches the whole path of a linear of {model.name}, as "
                    f"{paths[0]}; its linears are {known}"
                )
                raise SpecError(f"{where}.{field}", selection, expected)
        elif selection is not None and selection != (ALL_LINEAR,):
            for name in selection:
                if name == ALL_LINEAR or not any(_selects((name,), path) for path in among):
                    expected = f"a linear of {model.name}: {known}, or {ALL_LINEAR} alone"
                    if not set(name).isdisjoint(_PATTERN):
                        expected += " (names; a regular expression stands alone, as text)"
                    raise SpecError(f"{where}.{field}", name, expected)
    if isinstance(spec.targets, str):
        excluded = spec.exclude_modules
        for path in others:
            if _selects(spec.targets, path) and (excluded is None or not _selects(excluded, path)):
                expected = f"linears of layers alone, and it matches {path}: name them, or exclude_modules"
                raise SpecError(f"{where}.targets", spec.targets, expected)


_PATTERN = r"*+?|\()[]{}^$,"
"""Characters that no name of a linear has, and patterns and lists have."""


def _other_modules(model: ModelSpec) -> Iterator[str]:
    """Modules of the backbone that are no linears of layers; peft cannot adapt them, or they are not ours."""
    family = FAMILIES[model.family]
    tensors = [family.embedding, *([family.positions] if family.positions else [])]
    outside = ["lm_head", family.final_norm, *(tensor.removesuffix(".weight") for tensor in tensors)]
    for path in [*outside, *family.other_modules, family.layers]:
        yield from _with_parents(path)
    for layer in range(model.layers):
        inside = [*family.layer_norms, *family.other_layer_modules]
        inside += [linear.name.rpartition(".")[0] for linear in model.linears if "." in linear.name]
        yield f"{family.layers}.{layer}"
        yield from (module_path(model, layer, path) for path in dict.fromkeys(inside))


def _with_parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    for n in range(1, len(parts) + 1):
        yield ".".join(parts[:n])
