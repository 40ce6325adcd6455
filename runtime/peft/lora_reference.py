"""Definition of LoRA on a shared linear, in plain autograd: what the tests compare with."""

# T tokens of the stream, I features in, O features out

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor

from muxtune.batches import Span
from runtime.peft.lora import LoraPair


def lora_linear_reference(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    spans: Sequence[Span],
    adapters: Sequence[Sequence[LoraPair]],
    dropout_keys_T: Tensor | None = None,
) -> Tensor:
    """Definition of :func:`runtime.peft.lora.lora_linear`: task by task, plain autograd."""
    pieces: list[Tensor] = []
    for span, pairs in zip(spans, adapters, strict=True):
        x_tI = x_TI[span.start : span.stop]
        y_tO = F.linear(x_tI, weight_OI, bias_O)
        for pair in pairs:
            first, last = pair.columns
            read_tI = x_tI
            if pair.dropout is not None:
                assert dropout_keys_T is not None
                keep_tI = pair.dropout.keep(dropout_keys_T[span.start : span.stop], x_tI.shape[1])
                read_tI = x_tI * keep_tI / (1.0 - pair.dropout.rate)
            update = pair.scale * F.linear(F.linear(read_tI, pair.a_RI), pair.b_OR)
            y_tO = y_tO + F.pad(update, (first, len(weight_OI) - last))
        pieces.append(y_tO)
    return torch.cat(pieces)
