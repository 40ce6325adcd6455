"""Bottleneck adapters as plain modules of torch on a model of transformers, and their files.

Peft has no such method, so this is both what a task alone is compared with and what defines the files.
"""

# B sequences of S tokens, D hidden size

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.peft import attachments
from muxtune.peft.bottleneck import BottleneckSpec
from muxtune.support.files import write_text_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDS: dict[str, tuple[str, str]] = {"attention": ("attention", "attended"), "mlp": ("mlp", "inner")}
"""What the first and the last linears of a block read."""


def block_linears(model: ModelSpec, block: str) -> tuple[str, str]:
    """Paths in a layer of a linear that reads what the block reads, and of that which gives its output."""
    first, last = (next(each.name for each in model.linears if each.reads == end) for end in _ENDS[block])
    return first, last


def write_config(spec: BottleneckSpec, model: ModelSpec, base: str, folder: Path) -> None:
    """Write ``adapter_config.json``: the parameters, and where in the model the adapters stand.

    Args:
        spec: Parameters.
        model: The backbone.
        base: Its name or directory.
        folder: Folder, which is there.
    """
    ends = {block: block_linears(model, block) for block in spec.blocks}
    content = {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **spec.model_dump(mode="json", exclude={"method"}),
        "first_linear": {block: first for block, (first, _) in ends.items()},
        "last_linear": {block: last for block, (_, last) in ends.items()},
    }
    write_text_atomically(folder / "adapter_config.json", json.dumps(content, indent=2) + "\n")


def drawn_tensors(spec: BottleneckSpec, model: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Tensors that a task starts from, by their names in its file; the global generator stays as it was.

    Drawn in float32 layer by layer, attention before MLP, under ``torch.manual_seed(seed)``.
    """
    found: dict[str, Tensor] = {}
    dtype = torch.promote_types(getattr(torch, model.dtype), torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in range(model.layers):
            for each in attachments(spec, model, layer):
                path = f"{model.layer_prefix}.{layer}.{each.site.path}"
                down, up = nn.Linear(model.hidden, spec.size), nn.Linear(spec.size, model.hidden)
                for name, linear in (("down", down), ("up", up)):
                    for part, tensor in linear.named_parameters():
                        value = tensor.detach() if name == "down" else torch.zeros_like(tensor)
                        found[f"{path}.{name}.{part}"] = value.to(dtype)
    return found


class _Mlp(nn.Module):
    """``U act(D x + d) + u`` in the dtype of its tensors."""

    def __init__(self, spec: BottleneckSpec, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, spec.size, dtype=dtype)
        self.up = nn.Linear(spec.size, width, dtype=dtype)
        self.activation = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[
            spec.activation
        ]()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """What is added, before it is scaled."""
        result: Tensor = self.up(self.activation(self.down(x_BSD.to(self.down.weight.dtype))))
        return result


class PlainReference:
    """A task alone: hooks on the linears at both ends of the blocks of transformers' own model.

    Args:
        backbone: The model; it is frozen and gets the hooks.
        spec: Parameters.
        model: The backbone's shapes.
        seed: Seed of the initial adapter.
    """

    def __init__(self, backbone: PreTrainedModel, spec: BottleneckSpec, model: ModelSpec, seed: int) -> None:
        self.module: nn.Module = backbone.eval().requires_grad_(False)
        self._adapters: dict[str, _Mlp] = {}
        tensors = drawn_tensors(spec, model, seed)
        for path in dict.fromkeys(key.rsplit(".", 2)[0] for key in tensors):
            layer, _, block = path.rpartition(".")
            own = {name: tensors[f"{path}.{name}"] for name in _NAMES}
            adapter = _Mlp(spec, model.hidden, own["down.weight"].dtype)
            adapter.load_state_dict(own)
            first, last = (backbone.get_submodule(f"{layer}.{each}") for each in block_linears(model, block))
            _hook(adapter, first, last, spec)
            self.module.add_module(f"bottleneck {path}".replace(".", " "), adapter)
            self._adapters[path] = adapter

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under the keys of its file."""
        return {
            f"{path}.{name}": tensor.detach().clone()
            for path, adapter in self._adapters.items()
            for name, tensor in adapter.state_dict().items()
        }

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Nothing: the method draws no masks."""


_NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def _hook(adapter: _Mlp, first: nn.Module, last: nn.Module, spec: BottleneckSpec) -> None:
    read: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[:] = inputs[:1]

    def join(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given = output if spec.placement == "serial" else read.pop()
        return torch.add(output, adapter(given), alpha=spec.scale).to(output.dtype)

    if spec.placement == "parallel":
        first.register_forward_pre_hook(note)
    last.register_forward_hook(join)
