"""What one hTask puts on one rank of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.costs.compose import MicrobatchWork, message_bytes
from muxtune.memory.kept import KeptBytes, carried_kv_bytes, kept_bytes
from muxtune.memory.weights import WHOLE, Sharding, adapter_dtype_bytes, adapter_parameters
from muxtune.memory.workspace import DeviceKind, backward_workspace_bytes, forward_workspace_bytes
from muxtune.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class HTaskLoad:
    """What one hTask puts on one rank of a stage."""

    adapter_bytes: int
    kept: KeptBytes
    """Of each micro-batch in flight."""
    forward_workspace_bytes: int
    backward_workspace_bytes: int
    message_bytes: int
    """Hidden states of a micro-batch."""
    chunk_kv_bytes: int = 0
    """Of each carry group, while any of its micro-batches is in flight."""
    carry: int = 1
    """Micro-batches of a carry group."""


def htask_load(
    model: ModelSpec,
    layers: int,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    sharding: Sharding = WHOLE,
    device: DeviceKind = "cpu",
    carry: int = 1,
) -> HTaskLoad:
    """Measure an hTask by the model.

    Args:
        model: Backbone.
        layers: On the stage.
        first: The stage embeds.
        last: The stage has the head.
        work: Its fullest micro-batch; of a data-parallel replica, its own share.
        sharding: Over tensor-parallel ranks.
        device: Temporaries differ between kinds.
        carry: Micro-batches of its carry groups.
    """
    parameters = sum(adapter_parameters(model, layers, lora, sharding) for lora in work.loras)
    kept = kept_bytes(model, layers, first=first, last=last, work=work, sharding=sharding)
    return HTaskLoad(
        adapter_bytes=parameters * adapter_dtype_bytes(model),
        kept=kept,
        forward_workspace_bytes=forward_workspace_bytes(
            model, last=last, work=work, sharding=sharding, device=device
        ),
        backward_workspace_bytes=backward_workspace_bytes(
            model, last=last, work=work, sharding=sharding, device=device
        ),
        message_bytes=message_bytes(model, work.tokens) // sharding.token_ranks,
        chunk_kv_bytes=carried_kv_bytes(model, layers, tokens=work.carried_tokens, sharding=sharding),
        carry=carry,
    )
