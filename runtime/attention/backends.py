"""The backends by name, and which of them a device can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from muxtune.graph.attention_backends import AttentionName
from muxtune.model import ModelSpec
from muxtune.support.errors import SpecError
from runtime.attention.backend import AttentionBackend, AttentionSite
from runtime.attention.flex import FlexAttention
from runtime.attention.grouped import GroupedAttention, LoopAttention
from runtime.attention.masked import MaskedAttention
from runtime.attention.varlen import VarlenAttention

_ALL: Sequence[AttentionBackend] = (
    *(GroupedAttention(), LoopAttention(), VarlenAttention()),
    *(FlexAttention(), MaskedAttention()),
)

BACKENDS: dict[AttentionName, AttentionBackend] = {backend.name: backend for backend in _ALL}
"""Every backend, by the name that a plan has for it."""


def attention_site(model: ModelSpec, device: str) -> AttentionSite:
    """A backbone's attention on a device, ``cpu`` or ``cuda[:N]``; a GPU must be there."""
    kind = torch.device(device).type
    return AttentionSite(
        device=kind,
        dtype=getattr(torch, model.dtype),
        head_dim=model.head_dim,
        capability=torch.cuda.get_device_capability(device) if kind == "cuda" else None,
    )


def refusals(site: AttentionSite) -> dict[AttentionName, str | None]:
    """What each backend needs and does not have there; None where it runs."""
    return {name: backend.refusal(site) for name, backend in BACKENDS.items()}


def check_attention(name: AttentionName, site: AttentionSite, field: str = "execution.attention") -> None:
    """Refuse a backend that cannot train on a device.

    Raises:
        SpecError: Says what it needs, and which run there.
    """
    needs = refusals(site)
    if needs[name] is None:
        return
    running = ", ".join(other for other, need in needs.items() if need is None)
    raise SpecError(field, name, f"one that trains on this device ({running}): {name} needs {needs[name]}")
