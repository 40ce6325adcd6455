"""What autograd saves in a stage, from what the domain says that a rank keeps."""

from __future__ import annotations

from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import kept_bytes
from muxtune.memory.weights import FLOAT32_BYTES
from muxtune.model import ModelSpec
from muxtune.peft import Layers


def saved_bytes(model: ModelSpec, layers: Layers, *, first: bool, last: bool, work: MicrobatchWork) -> int:
    """The part of :func:`muxtune.memory.kept_bytes` that autograd saves: all but the messages."""
    kept = kept_bytes(model, layers, first=first, last=last, work=work).total_bytes
    message = work.tokens * model.hidden * model.dtype_bytes
    kept -= message * (not last)
    return kept - message * (not first and model.rms_norm and model.dtype_bytes != FLOAT32_BYTES)
