"""What a task alone trains: peft's own model of its method, or in plain torch what peft does not have.

Written from docs/runtime.md, docs/virtual-tokens.md, docs/bottleneck.md and docs/vectors-and-entries.md, and
shares no code with the runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import Tensor, nn

from tests.integration.peft_dropout import PeftDropout

Fields = Mapping[str, Any]
"""``peft`` of a task as in a workload file."""


class SoloAdapter(ABC):
    """A backbone of transformers with one adapter."""

    module: nn.Module

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under the keys of its file."""

    def enter(self, step: int, sequence: int) -> None:  # noqa: B027  # most methods have no masks
        """Prepare for the sequences of a batch from this one on."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save the adapter, where somebody else's code does."""


def attach_adapter(
    backbone: nn.Module, fields: Fields, seed: int, *, float32_adapter: bool = True
) -> SoloAdapter:
    """Freeze a backbone and give it the adapter that a task starts with.

    Args:
        backbone: Model of transformers.
        fields: ``peft`` of the task.
        seed: Seed of the task.
        float32_adapter: Whether the adapter has at least the precision of float32, as it has by default.
    """
    method = fields["method"]
    if method in _CONFIGS:
        return _PeftAdapter(backbone, fields, seed, float32_adapter=float32_adapter)
    dtype = torch.promote_types(backbone.dtype, torch.float32) if float32_adapter else backbone.dtype
    return _PlainAdapter(backbone, _PLAIN[method](backbone, fields, seed, dtype))


def _lora(fields: Fields, seed: int, model_type: str) -> PeftConfig:
    own = {"use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "exclude_modules"}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=fields["r"],
        lora_alpha=fields["alpha"],
        target_modules=_targets(fields),
        lora_dropout=fields.get("dropout", 0.0),
        layers_to_transform=fields.get("layers"),
        **{name: value for name, value in fields.items() if name in own},
    )


def _ia3(fields: Fields, seed: int, model_type: str) -> PeftConfig:
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=_targets(fields),
        feedforward_modules=fields.get("feedforward", []),
        fan_in_fan_out=model_type == "gpt2",
    )


def _shira(fields: Fields, seed: int, model_type: str) -> PeftConfig:
    return ShiraConfig(
        task_type="CAUSAL_LM", r=fields["r"], random_seed=seed, target_modules=_targets(fields)
    )


def _prefix(fields: Fields, seed: int, model_type: str) -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=fields["num_virtual_tokens"])


def _prompt(fields: Fields, seed: int, model_type: str) -> PeftConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=fields["num_virtual_tokens"])


_CONFIGS: dict[str, Callable[[Fields, int, str], PeftConfig]] = {
    "lora": _lora,
    "ia3": _ia3,
    "shira": _shira,
    "prefix_tuning": _prefix,
    "prompt_tuning": _prompt,
}


def _targets(fields: Fields) -> str | list[str]:
    return "all-linear" if list(fields["targets"]) == ["all-linear"] else list(fields["targets"])


class _PeftAdapter(SoloAdapter):
    def __init__(self, backbone: nn.Module, fields: Fields, seed: int, *, float32_adapter: bool) -> None:
        torch.manual_seed(seed)
        config = _CONFIGS[fields["method"]](fields, seed, backbone.config.model_type)
        exact = backbone.dtype == torch.float64
        model = get_peft_model(backbone, config, autocast_adapter_dtype=float32_adapter)
        if exact and hasattr(model, "prompt_encoder"):
            model.prompt_encoder.double()  # peft would keep virtual tokens in float32
        self.module = model.train()
        self._masks = PeftDropout(model, rate=fields.get("dropout", 0.0), seed=seed)

    def state(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.module, save_embedding_layers=False)
        return {key: tensor.detach().clone() for key, tensor in state.items()}

    def enter(self, step: int, sequence: int) -> None:
        self._masks.place = (step, sequence)

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder)


class _Part(nn.Module):
    """Trained tensors at one place of the backbone, and what they do there.

    Args:
        path: Path of the place, in the names of the file.
        trained: Tensors by their names in the file.
        fixed: Tensors of the file that are not trained.
    """

    def __init__(
        self, path: str, trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.path, self.fixed = path, dict(fixed or {})
        self.trained = nn.ParameterList(trained.values())
        self.names = list(trained)

    def state(self) -> dict[str, Tensor]:
        """Copy of its tensors under the keys of the file."""
        values = zip(self.names, self.trained, strict=True)
        trained = {name: tensor.detach().clone() for name, tensor in values}
        return {f"{self.path}.{name}": tensor for name, tensor in (trained | self.fixed).items()}


class _PlainAdapter(SoloAdapter):
    """Parts that hooks bring into transformers' own model."""

    def __init__(self, backbone: nn.Module, parts: Iterator[_Part]) -> None:
        backbone.requires_grad_(False)
        self._parts = nn.ModuleList(parts)
        self.module = backbone.train()
        self.module.add_module("solo_parts", self._parts)

    def state(self) -> dict[str, Tensor]:
        return {key: tensor for part in self._parts for key, tensor in part.state().items()}

    def save(self, folder: Path) -> None:
        """Nobody else has a format for these."""


def _bottleneck(backbone: nn.Module, fields: Fields, seed: int, dtype: torch.dtype) -> Iterator[_Part]:
    """``y + scale (U act(D x + d) + u)`` behind a block, of its output or of what its linears read."""
    torch.manual_seed(seed)
    act, scale = getattr(F, fields.get("activation", "gelu")), fields.get("scale", 1.0)
    hidden = backbone.config.hidden_size
    for path, layer in _layers(backbone, fields):
        for block in fields.get("blocks", ("attention", "mlp")):
            down, up = nn.Linear(hidden, fields["size"]), nn.Linear(fields["size"], hidden)
            values = {f"down.{name}": tensor.detach() for name, tensor in down.named_parameters()}
            values |= {f"up.{name}": torch.zeros_like(tensor) for name, tensor in up.named_parameters()}
            part = _Part(f"{path}.{block}", {name: tensor.to(dtype) for name, tensor in values.items()})
            first, last = (layer.get_submodule(end) for end in _ENDS[backbone.config.model_type][block])
            read: list[Tensor] = []
            if fields.get("placement") == "parallel":
                first.register_forward_pre_hook(lambda module, x, read=read: read.append(x[0]))

            def join(module, x, y, part=part, read=read) -> Tensor:
                d, d0, u, u0 = part.trained
                given = read.pop() if read else y
                return (y + scale * (act(given.to(d.dtype) @ d.T + d0) @ u.T + u0)).to(y.dtype)

            last.register_forward_hook(join)
            yield part


_ENDS = {
    "llama": {
        "attention": ("self_attn.q_proj", "self_attn.o_proj"),
        "mlp": ("mlp.gate_proj", "mlp.down_proj"),
    },
    "gpt2": {"attention": ("attn.c_attn", "attn.c_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj")},
    "opt": {"attention": ("self_attn.q_proj", "self_attn.out_proj"), "mlp": ("fc1", "fc2")},
}
"""First and last linear of each block of a layer."""


def _bitfit(backbone: nn.Module, fields: Fields, seed: int, dtype: torch.dtype) -> Iterator[_Part]:
    """The bias of every linear that has one."""
    for path, linear in _linears(backbone, fields):
        if linear.bias is None:
            continue
        part = _Part(path, {"bias": torch.zeros_like(linear.bias, dtype=dtype)})
        linear.register_forward_hook(lambda module, x, y, part=part: (y + part.trained[0]).to(y.dtype))
        yield part


def _diff(backbone: nn.Module, fields: Fields, seed: int, dtype: torch.dtype) -> Iterator[_Part]:
    """A share of the entries of each weight, at places that the seed draws."""
    for path, linear in _linears(backbone, fields):
        if not path.endswith(tuple(f".{target}" for target in fields["targets"])):
            continue
        shape = linear.weight.shape
        count = max(round(fields["density"] * shape.numel()), 1)
        drawn = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(seed))[:count]
        flat = drawn.sort().values
        places = torch.stack([flat // shape[1], flat % shape[1]])
        part = _Part(
            path, {"weight.values": torch.zeros(count, dtype=dtype)}, {"weight.indices": places.int()}
        )
        transposed = not isinstance(linear, nn.Linear)

        def add(module, x, y, part=part, places=places, shape=shape, transposed=transposed) -> Tensor:
            (values,) = part.trained
            dense = torch.zeros(shape, dtype=values.dtype).index_put(tuple(places), values)
            return (y + x[0].to(values.dtype) @ (dense if transposed else dense.T)).to(y.dtype)

        linear.register_forward_hook(add)
        yield part


_PLAIN: dict[str, Callable[[nn.Module, Fields, int, torch.dtype], Iterator[_Part]]] = {
    "bottleneck": _bottleneck,
    "bitfit": _bitfit,
    "diff": _diff,
}


def _layers(backbone: nn.Module, fields: Fields) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each layer that the task adapts."""
    prefix = {"gpt2": "transformer.h", "llama": "model.layers", "opt": "model.decoder.layers"}
    path = prefix[backbone.config.model_type]
    for number, layer in enumerate(backbone.get_submodule(path)):
        if number in fields.get("layers", [number]):
            yield f"{path}.{number}", layer


def _linears(backbone: nn.Module, fields: Fields) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each linear of these layers: torch's, or GPT-2's."""
    for path, layer in _layers(backbone, fields):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                yield f"{path}.{name}", module
