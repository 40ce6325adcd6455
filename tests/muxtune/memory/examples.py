"""Works and loads that a test can reckon by hand."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import HTaskLoad, KeptBytes, MicrobatchLoad
from muxtune.peft.lora import LoraSpec


def make_work(
    *,
    tokens: int = 512,
    length: int = 64,
    targets: float = 16,
    r: int = 8,
    adapted: tuple[str, ...] = ("all-linear",),
) -> MicrobatchWork:
    """One task whose padded sequences fill the stream."""
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=(tokens,),
        pefts=(LoraSpec(method="lora", r=r, alpha=r, targets=adapted),),
        attention=((1.0, tokens // length, length),),
        targets=targets,
    )


def make_load(
    adapter: int = 0,
    activation: int = 0,
    logit: int = 0,
    *,
    forward: int = 0,
    backward: int = 0,
    message: int = 0,
    left: Sequence[int] = (0,),
    left_gradient: int = 0,
) -> HTaskLoad:
    """An hTask's load in round numbers.

    Args:
        adapter: Bytes, as all others.
        activation: Of each micro-batch.
        logit: Likewise.
        forward: Temporaries.
        backward: Likewise.
        message: Of a micro-batch.
        left: By each micro-batch of a carry group.
        left_gradient: Of a carry group.
    """
    return HTaskLoad(
        adapter_bytes=adapter,
        microbatches=tuple(
            MicrobatchLoad(
                kept=KeptBytes(activation_bytes=activation, logit_bytes=logit),
                left_bytes=bytes_,
                forward_workspace_bytes=forward,
                backward_workspace_bytes=backward,
            )
            for bytes_ in left
        ),
        left_gradient_bytes=left_gradient,
        message_bytes=message,
    )
