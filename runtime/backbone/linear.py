"""A frozen linear of the backbone with the adapters of all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from runtime.ops.dropout import Dropout
from runtime.peft.lora import LoraPair, lora_linear


class SharedLinear(nn.Module):
    """Frozen linears that read the same input, as one product, with the adapters of all tasks.

    One product of 512 outputs instead of 256 + 128 + 128 also needs one input gradient and no additions.

    Args:
        weights: ``[O, I]`` of each linear by its path in the layer, in the order of their outputs.
        biases: ``[O]`` of each, or empty if they have none.
    """

    def __init__(self, weights: dict[str, Tensor], biases: Sequence[Tensor] = ()) -> None:
        super().__init__()
        # cat copies: a stage must not keep the whole model alive.
        self.weight_OI = nn.Parameter(torch.cat(list(weights.values())), requires_grad=False)
        self.bias_O = nn.Parameter(torch.cat(list(biases)), requires_grad=False) if biases else None
        self.columns: dict[str, tuple[int, int]] = {}
        stop = 0
        for name, weight in weights.items():
            self.columns[name] = (stop, stop + len(weight))
            stop += len(weight)
        self._pairs: dict[str, list[LoraPair]] = {}

    def attach(
        self,
        task_id: str,
        name: str,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dropout: Dropout | None = None,
    ) -> None:
        """Give a task its pair on the linear ``name``."""
        pair = LoraPair(a_RI, b_OR, scale, self.columns[name], dropout)
        self._pairs.setdefault(task_id, []).append(pair)

    def forward(
        self,
        x_TI: Tensor,
        spans: Sequence[Span],
        task_ids: Sequence[str],
        dropout_keys_T: Tensor | None = None,
    ) -> Tensor:
        """All outputs side by side, ``[T, O]``."""
        adapters = [self._pairs.get(task_id, ()) for task_id in task_ids]
        return lora_linear(x_TI, self.weight_OI, self.bias_O, spans, adapters, dropout_keys_T=dropout_keys_T)
