"""Bytes that a stage really holds."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from muxtune.schedule import Action

if TYPE_CHECKING:
    from runtime.tenant import Tenant


class StageMemory(BaseModel):
    """Bytes that one stage's rank held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone_bytes: int
    """Frozen weights, all instances."""
    adapter_bytes: int
    optimizer_bytes: int
    activation_peak_bytes: int
    """Saved for the backward by the micro-batches in flight, at the fullest point of the schedule."""
    peak_bytes: int
    """Backbone, adapters, optimizers and, at the fullest point, activations and gradients."""
    process_peak_rss_bytes: int
    """What the operating system saw; includes Python, libraries and loading."""


def measure_memory(
    actions: Sequence[Action],
    *,
    backbone_bytes: int,
    htask_tenants: Sequence[Iterable[Tenant]],
    saved_bytes: Mapping[int, int],
) -> StageMemory:
    """Add up what a stage held in a run.

    Args:
        actions: That the stage played.
        backbone_bytes: Of all instances.
        htask_tenants: Tasks of each hTask.
        saved_bytes: Per hTask, measured bytes that one micro-batch keeps until its backward.
    """
    adapters = [sum(tenant.adapter_bytes for tenant in tenants) for tenants in htask_tenants]
    optimizers = sum(tenant.optimizer_bytes for tenants in htask_tenants for tenant in tenants)
    activations, with_gradients = peaks(actions, saved_bytes, dict(enumerate(adapters)))
    return StageMemory(
        backbone_bytes=backbone_bytes,
        adapter_bytes=sum(adapters),
        optimizer_bytes=optimizers,
        activation_peak_bytes=activations,
        peak_bytes=backbone_bytes + sum(adapters) + optimizers + with_gradients,
        process_peak_rss_bytes=_peak_rss_bytes(),
    )


def peaks(
    actions: Sequence[Action], saved_bytes: Mapping[int, int], gradient_bytes: Mapping[int, int]
) -> tuple[int, int]:
    """Most bytes of open micro-batches, without and with gradients, over a stage's actions.

    A micro-batch is open from its F to the end of its B; gradients live from an hTask's first B to its STEP.
    """
    saved = 0
    gradients: dict[int, int] = {}
    without = both = 0
    for action in actions:
        h = action.htask
        if action.kind == "F":
            saved += saved_bytes[h]
        elif action.kind == "B":
            gradients[h] = gradient_bytes[h]
        without = max(without, saved)
        both = max(both, saved + sum(gradients.values()))
        if action.kind == "B":
            saved -= saved_bytes[h]
        elif action.kind == "STEP":
            gradients.pop(h, None)
    return without, both


def _peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
