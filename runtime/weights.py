"""Weights of a backbone, tensor by tensor: a rank holds its stage, and while it loads, one more tensor.

A directory's safetensors files are mapped into memory, so that only the rows that a rank copies are read. A
preset's weights are random numbers: transformers builds the model without memory, every draw is made and
dropped at once, and a tensor that a stage asks for is drawn again from where the generator stood then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from muxtune.model import ModelSpec
from runtime.backbone import hf_config, load_hf_model, torch_dtype
from runtime.layers import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)

_WHOLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


def open_weights(spec: ModelSpec) -> Weights:
    """Weights bit for bit those of :func:`runtime.backbone.load_hf_model`, without loading them all.

    A directory that is not made of safetensors under the model's names is loaded whole; the log says so.

    Raises:
        SpecError: The weights of a directory are missing, unreadable or incomplete.
    """
    if spec.source == "preset":
        return DrawnWeights(spec)
    try:
        return StoredWeights(spec)
    except _NotPlainError as error:
        _LOG.warning("%s: %s; every rank loads the whole backbone", spec.source, error)
        whole: Weights = load_hf_model(spec)
        return whole


class _NotPlainError(Exception):
    """Transformers may still know how to load it; if not, it knows best what is wrong."""


class StoredWeights:
    """Tensors of a Hugging Face directory, read when they are asked for.

    Args:
        spec: Its backbone.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = torch_dtype(spec)
        config = hf_config(spec)
        if getattr(config, "quantization_config", None) is not None:
            raise _NotPlainError("quantized weights")
        with torch.device("meta"):
            skeleton = _build_model(spec)
        self._places = _find_tensors(skeleton, _stored_tensors(Path(spec.source)))

    def get_parameter(self, target: str, /) -> Tensor:
        """The tensor of this name, a view of the file if that has the backbone's dtype."""
        from safetensors import safe_open  # noqa: PLC0415  # with transformers

        place = self._places[target]
        # Open for this tensor alone: pages that were read count as ours as long as the file is mapped.
        with safe_open(place.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(place.name)
        return tensor.to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    name: str
    shape: tuple[int, ...]


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """All tensors of a directory by their names in the files."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  # with transformers

    stored = {}
    try:
        for path in _safetensors_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    stored[name] = _Stored(path, name, tuple(file.get_slice(name).get_shape()))
    except (OSError, SafetensorError) as error:
        raise _NotPlainError(" ".join(str(error).split())) from error
    return stored


def _safetensors_files(folder: Path) -> Sequence[Path]:
    if (folder / _WHOLE_FILE).is_file():
        return [folder / _WHOLE_FILE]
    try:
        index = json.loads((folder / _INDEX_FILE).read_text())
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise _NotPlainError(f"neither {_WHOLE_FILE} nor a readable {_INDEX_FILE}") from error


def _find_tensors(skeleton: PreTrainedModel, stored: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """Where each parameter of the model lies; tied ones share a place unless both are stored."""
    names = dict(skeleton.named_parameters(remove_duplicate=False))
    places: dict[str, _Stored] = {}
    for key, place in stored.items():
        places |= {name: place for name in _possible_names(key, skeleton.base_model_prefix) if name in names}
    tied: dict[int, _Stored] = {id(names[name]): place for name, place in places.items()}
    for name, parameter in names.items():
        place = places.setdefault(name, tied.get(id(parameter), _Stored(Path(), "", ())))
        if place.shape != parameter.shape:
            raise _NotPlainError(f"no {name} of shape {list(parameter.shape)}")
    return places


def _possible_names(key: str, prefix: str) -> Iterator[str]:
    """Of the parameter that a stored tensor is; files of a model without its head lack the prefix."""
    yield key
    yield f"{prefix}.{key}"
    yield key.removeprefix(f"{prefix}.")


class DrawnWeights:
    """Tensors of a preset, drawn when they are asked for; torch's global generator stays as it was.

    Args:
        spec: The preset.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = torch_dtype(spec)
        self._tape = _DrawTape()
        with torch.random.fork_rng(devices=[]), self._tape:
            torch.manual_seed(spec.init_seed)
            self._model = _build_model(spec)
        self._tape.close()

    def get_parameter(self, target: str, /) -> Tensor:
        """The tensor of this name."""
        # Drawn in float32 and then cast, so that a preset is the same model in every dtype.
        return self._tape.values_of(self._model.get_parameter(target)).to(self._dtype)


def _build_model(spec: ModelSpec) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # seconds to import

    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        hf_config(spec), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model


@dataclass(frozen=True, slots=True)
class _Write:
    """The last thing that was written into a tensor."""

    operation: OpOverload
    """In place, of ``torch.ops.aten``."""
    arguments: tuple[Any, ...]
    state: Tensor | None
    """Of the generator before; None if nothing is drawn."""

    def into(self, values: Tensor) -> Tensor:
        """The same again."""
        if self.state is not None:
            torch.set_rng_state(self.state)
        self.operation(values, *self.arguments)
        return values


class _DrawTape(TorchDispatchMode):
    """Gives new tensors no memory, and notes what is written into them; numbers are drawn and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, _Write] = {}
        self._dropped = torch.empty(0)
        """Room for draws. One for all: between small things that stay, freed ones would leave holes."""

    def close(self) -> None:
        """No more is to come."""
        self._dropped = torch.empty(0)

    def values_of(self, tensor: Tensor) -> Tensor:
        """What the tensor holds, or would hold if it had memory."""
        if not tensor.is_meta:  # made of numbers, such as a norm's ones
            return tensor
        with torch.random.fork_rng(devices=[]):
            return self._last[_storage_key(tensor)].into(torch.empty(tensor.shape))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **kwargs | {"device": "meta"})
        if not func._schema.is_mutable or not args[0].is_meta:
            return func(*args, **kwargs)
        target, *arguments = args
        assert target.nbytes == target.untyped_storage().nbytes(), "presets write whole tensors"
        draws = torch.Tag.nondeterministic_seeded in func.tags
        write = _Write(func, tuple(arguments), torch.get_rng_state() if draws else None)
        if draws:
            if len(self._dropped) < target.numel():
                self._dropped = torch.empty(target.numel())
            write.into(self._dropped[: target.numel()].view(target.shape))
        self._last[_storage_key(target)] = write
        return target


def _storage_key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
