"""Weights of a backbone, tensor by tensor: a rank holds its stage, and while it loads, one more tensor.

A directory's safetensors files are mapped into memory, so that only the rows that a rank copies are read. A
preset's weights are random numbers: transformers builds the model without memory, every draw is made and
dropped at once, and a tensor that a stage asks for is drawn again from where the generator stood then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muxtune.model import ModelSpec, is_pickled, locate_tensors, weight_files
from runtime.backbone.hugging_face import hf_config, load_hf_model, torch_dtype
from runtime.backbone.layers import Weights
from runtime.device.torch_internals import intercepting, storage_key, writes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.device.torch_internals import OpOverload

_LOG = logging.getLogger(__name__)


def open_weights(spec: ModelSpec) -> Weights:
    """Weights bit for bit those of :func:`load_hf_model`, without loading them all.

    Torch's own files (``*.bin``) are loaded whole; the log says so.

    Raises:
        SpecError: The weights of a directory are missing, unreadable, incomplete or not all used.
    """
    if spec.source == "preset":
        return DrawnWeights(spec)
    if is_pickled(weight_files(Path(spec.source))):
        reason = "neither model.safetensors nor a readable model.safetensors.index.json"
        _LOG.warning("%s: %s; every rank loads the whole backbone", spec.source, reason)
        whole: Weights = load_hf_model(spec)
        return whole
    return StoredWeights(spec)


class StoredWeights:
    """Tensors of a Hugging Face directory, read when they are asked for.

    Args:
        spec: Backbone of the directory.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = torch_dtype(spec)
        self._places = locate_tensors(spec)

    def get_parameter(self, target: str, /) -> Tensor:
        """The tensor of this name, a view of the file if that has the backbone's dtype."""
        from safetensors import safe_open  # noqa: PLC0415  # with transformers

        place = self._places[target]
        # Open for this tensor alone: pages that were read count as ours as long as the file is mapped.
        with safe_open(place.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(place.name)
        return tensor.to(self._dtype)


class DrawnWeights:
    """Tensors of a preset, drawn when they are asked for; torch's global generator stays as it was.

    Args:
        spec: The preset.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._dtype = torch_dtype(spec)
        self._tape = _DrawTape()
        with torch.random.fork_rng(devices=[]), intercepting(self._tape.handle):
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
        hf_config(spec), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    return model


@dataclass(frozen=True, slots=True)
class _Write:
    """The last thing that was written into a tensor."""

    operation: OpOverload
    """Operation of ``torch.ops.aten``, in place."""
    arguments: tuple[Any, ...]
    state: Tensor | None
    """State of the generator before; None if nothing is drawn."""

    def into(self, values: Tensor) -> Tensor:
        """Write again, into ``values``."""
        if self.state is not None:
            torch.set_rng_state(self.state)
        self.operation(values, *self.arguments)
        return values


class _DrawTape:
    """Gives new tensors no memory, and notes what is written into them; numbers are drawn and dropped."""

    def __init__(self) -> None:
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
            return self._last[storage_key(tensor)].into(torch.empty(tensor.shape))

    def handle(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Do an operation of ATen, or note it."""
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **kwargs | {"device": "meta"})
        if not writes(func) or not args[0].is_meta:
            return func(*args, **kwargs)
        target, *arguments = args
        assert target.nbytes == target.untyped_storage().nbytes(), "presets write whole tensors"
        draws = torch.Tag.nondeterministic_seeded in func.tags
        write = _Write(func, tuple(arguments), torch.get_rng_state() if draws else None)
        if draws:
            if len(self._dropped) < target.numel():
                self._dropped = torch.empty(target.numel())
            write.into(self._dropped[: target.numel()].view(target.shape))
        self._last[storage_key(target)] = write
        return target
