"""What one hTask puts on one rank of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.cluster import DeviceKind
from muxtune.costs.compose import MicrobatchWork, message_bytes
from muxtune.memory.carried import carried_gradient_bytes, carried_kv_bytes
from muxtune.memory.saved_activations import KeptBytes, kept_bytes
from muxtune.memory.weights import WHOLE, Sharding, adapter_dtype_bytes, adapter_parameters
from muxtune.memory.workspace import backward_workspace_bytes, forward_workspace_bytes
from muxtune.model import ModelSpec
from muxtune.peft import Layers, count_layers, runs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchLoad:
    """What a micro-batch puts on one rank of a stage."""

    kept: KeptBytes
    """Bytes that it keeps while it is in flight."""
    left_bytes: int = 0
    """Keys and values that later micro-batches of its carry group use, while it is in flight."""
    forward_workspace_bytes: int
    backward_workspace_bytes: int

    @property
    def open_bytes(self) -> int:
        """All that it holds while it is in flight."""
        return self.kept.total_bytes + self.left_bytes


@dataclass(frozen=True, kw_only=True)
class HTaskLoad:
    """What one hTask puts on one rank of a stage."""

    adapter_bytes: int
    microbatches: tuple[MicrobatchLoad, ...]
    """Micro-batches of a carry group, in order; a single one by default."""
    left_gradient_bytes: int = 0
    """Gradients of the keys and values that a carry group has left, from its first backward to its last."""
    message_bytes: int
    """Hidden states of a micro-batch."""

    @property
    def carry(self) -> int:
        """Micro-batches of a carry group."""
        return len(self.microbatches)

    def microbatch(self, number: int) -> MicrobatchLoad:
        """Load of the micro-batch with this number, in whatever step."""
        return self.microbatches[number % len(self.microbatches)]


def htask_load(
    model: ModelSpec,
    layers: Layers,
    *,
    first: bool,
    last: bool,
    works: Sequence[MicrobatchWork],
    sharding: Sharding = WHOLE,
    device: DeviceKind = "cpu",
) -> HTaskLoad:
    """Measure an hTask by the model.

    Args:
        model: Backbone.
        layers: Layers of the stage.
        first: The stage embeds.
        last: The stage has the head.
        works: Work of the fullest micro-batch, or of the micro-batches of the fullest carry group in their
            order; for a data-parallel replica, its own share.
        sharding: Division of the stage among tensor-parallel ranks.
        device: Temporaries differ between kinds.
    """
    one, count, last_layer = works[0], count_layers(layers), runs_of(layers)[-1][0]
    parameters = sum(adapter_parameters(model, layers, peft, sharding, first=first) for peft in one.pefts)
    return HTaskLoad(
        adapter_bytes=parameters * adapter_dtype_bytes(model),
        microbatches=tuple(
            MicrobatchLoad(
                kept=kept_bytes(model, layers, first=first, last=last, work=work, sharding=sharding),
                left_bytes=carried_kv_bytes(model, count, tokens=work.left_tokens, sharding=sharding),
                forward_workspace_bytes=forward_workspace_bytes(
                    model, last=last, work=work, layer=last_layer, sharding=sharding, device=device
                ),
                backward_workspace_bytes=backward_workspace_bytes(
                    model, last=last, work=work, layer=last_layer, sharding=sharding, device=device
                ),
            )
            for work in works
        ),
        left_gradient_bytes=carried_gradient_bytes(model, count, works=works, sharding=sharding),
        message_bytes=message_bytes(model, one.tokens),
    )
