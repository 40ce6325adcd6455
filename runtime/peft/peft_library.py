"""What is asked of Hugging Face peft, whatever the method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from muxtune.model import ALL_LINEAR, ModelSpec
from muxtune.peft import TargetedSpec, module_path, targeted_paths
from muxtune.peft.start import WEIGHTS
from muxtune.support.errors import SpecError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence transformers' notice that peft uses an old name of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def attach_peft(
    backbone: PreTrainedModel, config: PeftConfig, seed: int, start: Path | None = None
) -> PeftModel:
    """``torch.manual_seed(seed); get_peft_model(backbone, config)``; the global generator stays as it was.

    Args:
        backbone: The backbone.
        config: Configuration of the adapter.
        seed: Seed of its first values.
        start: Folder of a saved adapter, whose values it gets instead.

    Raises:
        SpecError: The saved adapter has other tensors.
    """
    from peft import get_peft_model  # noqa: PLC0415  # seconds to import

    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        model = cast("PeftModel", get_peft_model(backbone, config))
    if start is not None:
        _load(model, start)
    return model


def _load(model: PeftModel, start: Path) -> None:
    """Give an adapter the values of a saved one, which has to have the same tensors."""
    from peft import set_peft_model_state_dict  # noqa: PLC0415  # seconds to import
    from safetensors import SafetensorError  # noqa: PLC0415  # with transformers
    from safetensors.torch import load_file  # noqa: PLC0415

    path = start / WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpecError("peft.init", str(path), f"a readable safetensors file ({error})") from error
    own = peft_state(model)
    for key in sorted(own.keys() | saved.keys()):
        theirs, ours = (tuple(each[key].shape) if key in each else "no tensor" for each in (saved, own))
        if theirs != ours:
            raise SpecError(f"peft.init: {path}: {key}", theirs, f"{ours}, as the task has it")
    set_peft_model_state_dict(model, saved)


def peft_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a peft model's adapter under the keys of its file."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415  # seconds to import

    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


class PeftReference:
    """A peft model of a task alone whose micro-batches need no preparation.

    Args:
        peft_model: Model that ``get_peft_model`` returned.
    """

    def __init__(self, peft_model: nn.Module) -> None:
        self.module = peft_model.eval()  # the frozen backbone's dropouts are off, as in the runtime

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under peft's keys."""
        return {key: tensor.detach().clone() for key, tensor in peft_state(self.module).items()}

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Nothing to prepare."""


def needs_paths(spec: TargetedSpec) -> bool:
    """Whether peft gets the whole path of every module: not all its methods can choose layers, or exclude."""
    return spec.layers is not None or spec.exclude_modules is not None


def peft_targets(spec: TargetedSpec, model: ModelSpec) -> str | list[str]:
    """Linears that a task adapts, as peft's ``target_modules``."""
    if needs_paths(spec):
        paths = enumerate(targeted_paths(spec, model))
        return [module_path(model, layer, path) for layer, own in paths for path in sorted(own)]
    if isinstance(spec.targets, str):
        return spec.targets
    return ALL_LINEAR if spec.targets == (ALL_LINEAR,) else list(spec.targets)


def write_initial(
    skeleton: PreTrainedModel, config: PeftConfig, seed: int, folder: Path, start: Path | None = None
) -> dict[str, Tensor]:
    """The adapter that a task starts from, see :func:`attach_peft`; its configuration goes to the folder."""
    model = attach_peft(skeleton, config, seed, start)
    state = peft_state(model)
    written = model.peft_config["default"]
    written.inference_mode = True  # as peft saves it: loaded for use unless asked otherwise
    targets = getattr(written, "target_modules", None)
    if targets is not None and not isinstance(targets, str):
        # A set, whose order would differ from run to run; peft makes it a set again.
        written.target_modules = sorted(targets)
    written.save_pretrained(str(folder))
    return state
