"""Tensors that the weight files of a Hugging Face directory hold, and whether they are the backbone's.

Only headers are read. What is stored and not used would mean that the folder's owner computes something else
than we do, so it is refused by name, and so is what is missing. A folder without any weights may be planned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from muxtune.model.families import FAMILIES
from muxtune.model.parameters import HEAD, Shape, parameter_shapes
from muxtune.model.spec import ModelSpec
from muxtune.support.errors import SpecError

_FLOATS = {"F64", "F32", "F16", "BF16"}

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    file: Path
    name: str
    """Name in the file."""
    shape: Shape
    dtype: str
    """Type as safetensors names it, e.g. ``BF16``."""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's weights, those that transformers would choose; none if there are none.

    Raises:
        SpecError: An index cannot be read, or names a file outside of the folder.
    """
    for whole, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / whole).is_file():
            return (folder / whole,)
        if (folder / index).is_file():
            return _indexed_files(folder / index)
    return ()


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [Path(name) for name in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = f"a readable {index.name} with a weight_map ({type(error).__name__})"
        raise SpecError("model.source", str(index.parent), expected) from error
    for name, path in zip(named, paths, strict=True):
        # Links are fine: the hub's cache is made of them, and only the folder's owner can put one there.
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise SpecError(f"{index}: weight_map", name, "the name of a file in the index's own folder")
    return tuple(index.parent / path for path in paths)


def is_pickled(files: Iterable[Path]) -> bool:
    """Whether weights are torch's own files, which only torch reads."""
    return any(file.suffix == ".bin" for file in files)


def check_stored(spec: ModelSpec) -> None:
    """Refuse a directory whose safetensors are not exactly the backbone's.

    Pickled weights are looked at when they are loaded, as only torch can read them; a folder without weights
    can be planned, not run.

    Raises:
        SpecError: Names the tensors.
    """
    files = weight_files(Path(spec.source))
    if files and not is_pickled(files):
        locate_tensors(spec)


def locate_tensors(spec: ModelSpec) -> dict[str, StoredTensor]:
    """Where each parameter of a backbone lies in the safetensors of its directory.

    Tied parameters share a place unless both are stored, as transformers has it.

    Raises:
        SpecError: A file is missing or unreadable, or a tensor missing, unused or of another shape or kind.
    """
    stored = _read_headers(spec)
    names = match_names(spec, stored)
    shapes = parameter_shapes(spec)
    places = {name: stored[key] for name, key in names.items()}
    for name, place in places.items():
        if place.shape != shapes[name]:
            expected = f"{name} of shape {list(shapes[name])}, not {list(place.shape)}"
            raise SpecError("model.source", spec.source, expected)
        if place.dtype not in _FLOATS:
            expected = f"weights in {', '.join(sorted(_FLOATS))}; {name} is {place.dtype}"
            raise SpecError("model.source", spec.source, expected)
    if spec.tied_embeddings:
        embedding = FAMILIES[spec.family].embedding
        places.setdefault(HEAD, places.get(embedding, next(iter(places.values()))))
        places.setdefault(embedding, places[HEAD])
    return places


def match_names(spec: ModelSpec, stored: Iterable[str]) -> dict[str, str]:
    """Name in the files of each stored parameter; a tied one may be absent.

    Args:
        spec: The backbone.
        stored: Names of all tensors in the files.

    Raises:
        SpecError: Names tensors that are missing or that nothing uses.
    """
    found = list(stored)
    if len(found) < spec.layers:  # a number of layers that nobody wants listed, too
        expected = f"weights for all of the model; missing some, as {len(found)} are for {spec.layers} layers"
        raise SpecError("model.source", spec.source, expected)
    wanted, family = parameter_shapes(spec), FAMILIES[spec.family]
    names: dict[str, str] = {}
    unused = []
    for key in found:
        name = next((each for each in _possible_names(key, family.prefix) if each in wanted), None)
        if name is not None and name not in names:
            names[name] = key
        elif not family.derived_tensors.fullmatch(key):
            unused.append(key)
    stands_for = {HEAD: family.embedding} if spec.tied_embeddings else {}
    if HEAD in names:
        stands_for |= {embedding: HEAD for embedding in stands_for.values()}
    missing = [name for name in wanted if name not in names and name not in stands_for]
    if missing:
        expected = f"weights for all of the model; missing {_some(missing)}"
        raise SpecError("model.source", spec.source, expected)
    if unused:
        expected = f"no tensors that config.json has no use for; found {_some(unused)}{_hint(spec, unused)}"
        raise SpecError("model.source", spec.source, expected)
    return names


def _read_headers(spec: ModelSpec) -> Mapping[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  # only where weights are looked at

    stored: dict[str, StoredTensor] = {}
    files = weight_files(Path(spec.source))
    if not files:
        raise SpecError("model.source", spec.source, "a directory with weights (model.safetensors)")
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    view = file.get_slice(name)
                    stored[name] = StoredTensor(path, name, tuple(view.get_shape()), view.get_dtype())
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            expected = f"a directory with readable weights ({path.name}: {reason})"
            raise SpecError("model.source", spec.source, expected) from error
    return stored


def _possible_names(key: str, prefix: str) -> Iterator[str]:
    """Names that a stored tensor's parameter may have; files of a model without its head lack the prefix."""
    yield key
    yield f"{prefix}.{key}"
    yield key.removeprefix(f"{prefix}.")


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


_QUANTIZED = re.compile(r"\.(weight_scale|scales|qweight|qzeros|g_idx|absmax|SCB)(\.|_|$)")
"""Tensors that stand beside quantized weights."""


def _hint(spec: ModelSpec, unused: list[str]) -> str:
    if any(_QUANTIZED.search(name) for name in unused):
        return " (quantized weights are not executed)"
    linears = {f".{linear.name}.bias": linear for linear in spec.linears}
    attention, mlp = FAMILIES[spec.family].bias_keys
    keys = {
        attention if linear.reads in {"attention", "attended"} else mlp
        for suffix, linear in linears.items()
        if any(name.endswith(suffix) for name in unused)
    }
    if not keys:
        return ""
    return f" ({' and '.join(sorted(keys))} {'is' if len(keys) == 1 else 'are'} false)"
