"""Adapters in the format of Hugging Face peft: initialization, loading, saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muxtune.model import ModelSpec
from muxtune.peft import attachments, module_path, start_digest
from muxtune.support.errors import SpecError
from muxtune.support.files import write_atomically, write_text_atomically
from muxtune.tasks import PeftTask
from runtime.backbone.hugging_face import hf_config, torch_dtype
from runtime.backbone.layers import Weights
from runtime.backbone.weights import open_weights
from runtime.peft import RUNTIME_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def initial_adapter(spec: ModelSpec, task: PeftTask, folder: Path, weights: Weights | None = None) -> None:
    """Write the adapter that a task starts from under its seed, as peft does where it has the method.

    It is built on a skeleton of the backbone of whose memory nothing is touched, or that of adapted linears
    where the values depend on theirs; the values are bit for bit those of ``torch.manual_seed(task.seed);
    get_peft_model(model, config)``. The global generator stays as it was.

    Args:
        spec: Backbone.
        task: Task whose adapter it is.
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        weights: Those of the backbone; by default they are opened if they are asked for.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # seconds to import

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            hf_config(spec), dtype=torch_dtype(spec), trust_remote_code=False
        )
    skeleton.to_empty(device="cpu")
    skeleton.name_or_path = spec.name if spec.source == "preset" else spec.source
    if task.peft.starts_from_weights:
        _fill(skeleton, spec, task, open_weights(spec) if weights is None else weights)
    init = task.peft.init
    if init is not None and task.peft.init_sha256 not in {
        None,
        start_digest(init, f"tasks.{task.id}.peft.init"),
    }:
        expected = (
            f"the adapter that the plan was made for (sha256 {task.peft.init_sha256:.12}..., plan again)"
        )
        raise SpecError(f"tasks.{task.id}.peft.init", str(init), expected)
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder, RUNTIME_METHODS.get(task.peft.method).initial(skeleton, task, spec, folder))


@torch.no_grad()
def _fill(skeleton: PreTrainedModel, spec: ModelSpec, task: PeftTask, weights: Weights) -> None:
    """Give the linears that a task is attached to their weights and biases."""
    paths = {
        module_path(spec, layer, each.site.path)
        for layer in range(spec.layers)
        for each in attachments(task.peft, spec, layer)
    }
    for name, parameter in skeleton.named_parameters():
        if name.rpartition(".")[0] in paths:
            parameter.copy_(weights.get_parameter(name))


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """Tensors of a saved adapter under peft's names.

    Raises:
        SpecError: The file is missing or unreadable.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  # with transformers
    from safetensors.torch import load_file  # noqa: PLC0415

    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpecError("adapter", str(path), f"a readable safetensors file ({error})") from error


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], like: Path) -> None:
    """Write an adapter that peft loads; a crash leaves the old files whole.

    Args:
        folder: Folder to write to.
        tensors: Trained tensors of the whole model, under peft's names.
        like: Folder of the task's initial adapter, which has the same names and configuration; what it has
            of whole numbers, such as places in a weight, is not trained and stays.

    Raises:
        SpecError: The names are not those of ``like``.
    """
    expected = load_adapter(like)
    tensors = {k: t for k, t in expected.items() if not t.is_floating_point()} | dict(tensors)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise SpecError(f"adapter for {folder}", odd[0], f"the same tensors as in {like}")
    write_text_atomically(folder / CONFIG_FILE, (like / CONFIG_FILE).read_text())
    _save_tensors(folder, tensors)


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(content, path, metadata={"format": "pt"}))
