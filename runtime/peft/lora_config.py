"""LoRA as Hugging Face peft configures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from muxtune.model import ModelSpec
from muxtune.peft.lora import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig


def peft_config(lora: LoraSpec, model: ModelSpec) -> LoraConfig:
    """The method as peft configures it."""
    from peft import LoraConfig  # noqa: PLC0415  # seconds to import

    return LoraConfig(
        r=lora.r,
        lora_alpha=_number(lora.alpha),
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={name: _number(alpha) for name, alpha in lora.alpha_pattern},
        bias=lora.bias,
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.transposed_weights,
        **_places(lora, model),
    )


def _number(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _places(lora: LoraSpec, model: ModelSpec) -> dict[str, Any]:
    """Targets and layers; where layers are chosen, peft wants all linears by their names."""
    targets: str | list[str] = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if targets == ["all-linear"]:
        everything = [linear.name for linear in model.linears]
        targets = "all-linear" if lora.layers is None else everything
    excluded = lora.exclude_modules
    return {
        "target_modules": targets,
        "exclude_modules": excluded if excluded is None or isinstance(excluded, str) else list(excluded),
        "layers_to_transform": None if lora.layers is None else list(lora.layers),
    }
