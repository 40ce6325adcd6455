"""Works and loads that a test can reckon by hand."""

from __future__ import annotations

from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import HTaskLoad, KeptBytes
from muxtune.workload import LoraSpec


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
        loras=(LoraSpec(method="lora", r=r, alpha=r, targets=adapted),),
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
    chunk_kv: int = 0,
    carry: int = 1,
) -> HTaskLoad:
    """An hTask's load in round numbers."""
    return HTaskLoad(
        adapter_bytes=adapter,
        kept=KeptBytes(activation_bytes=activation, logit_bytes=logit),
        forward_workspace_bytes=forward,
        backward_workspace_bytes=backward,
        message_bytes=message,
        chunk_kv_bytes=chunk_kv,
        carry=carry,
    )
