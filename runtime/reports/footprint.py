"""Bytes that a stage really holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from muxtune.schedule import Action
from runtime.device.process_memory import process_peak_bytes

if TYPE_CHECKING:
    from runtime.tasks.tenant import Tenant


class MeasuredMemory(BaseModel):
    """Bytes that one stage's rank held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone_bytes: int
    """Frozen weights, all instances."""
    table_bytes: int
    """Tables of rotary positions, all instances."""
    adapter_bytes: int
    optimizer_bytes: int
    activation_peak_bytes: int
    """Kept by the micro-batches in flight, at the fullest point of the schedule."""
    message_peak_bytes: int
    """Most bytes of messages that are to come, being worked on, or sent."""
    workspace_peak_bytes: int
    """Temporaries of the action that has most of them."""
    peak_bytes: int
    """Bytes of all of it at the fullest point of the schedule, with the adapters' gradients."""
    process_peak_bytes: int
    """What the operating system saw at most; includes Python, libraries and loading."""
    process_start_bytes: int
    """Bytes right before the rank built its stage, with the libraries loaded."""
    device_peak_bytes: int | None = None
    """What torch's allocator had given out at most on the rank's GPU; null on CPU, where tensors are the
    process's own memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionBytes:
    """What a stage's actions were seen to hold."""

    kept: Mapping[tuple[int, int], int]
    """Per hTask and number of a micro-batch that was counted, bytes that stay from its forward to its
    backward; at least one whole step of each hTask."""
    forward_workspace: Mapping[int, int]
    """Per hTask, most bytes of a forward beyond what it keeps."""
    backward_workspace: Mapping[int, int]
    """Per hTask, most bytes of a backward beyond what was there before."""
    messages: Sequence[int]
    """Bytes of messages at each F and B, in the order of the actions."""
    left_gradients: Mapping[int, int] = field(default_factory=dict)
    """Per hTask that has carry groups, most bytes of gradients of the keys and values that a group leaves to
    its later micro-batches."""


def measure_memory(
    actions: Sequence[Action],
    *,
    microbatches: Sequence[int],
    carries: Sequence[int],
    backbone_bytes: int,
    table_bytes: int,
    htask_tenants: Sequence[Iterable[Tenant]],
    seen: ActionBytes,
    process_start_bytes: int,
    device_peak_bytes: int | None = None,
) -> MeasuredMemory:
    """Add up what a stage held in a run.

    Args:
        actions: Actions that the stage played.
        microbatches: Micro-batches per hTask and step.
        carries: Micro-batches of a carry group, per hTask.
        backbone_bytes: Bytes of the weights of all instances.
        table_bytes: Bytes of the rotary tables of all instances.
        htask_tenants: Tasks of each hTask.
        seen: Bytes that were counted for the actions.
        process_start_bytes: Bytes that the process had right before the stage was built.
        device_peak_bytes: Most bytes that the rank's GPU had given out.
    """
    adapters = [sum(tenant.adapter_bytes for tenant in tenants) for tenants in htask_tenants]
    optimizers = sum(tenant.optimizer_bytes for tenants in htask_tenants for tenant in tenants)
    activations, everything = peaks(actions, microbatches, seen, adapters, carries)
    return MeasuredMemory(
        backbone_bytes=backbone_bytes,
        table_bytes=table_bytes,
        adapter_bytes=sum(adapters),
        optimizer_bytes=optimizers,
        activation_peak_bytes=activations,
        message_peak_bytes=max(seen.messages, default=0),
        workspace_peak_bytes=max(*seen.forward_workspace.values(), *seen.backward_workspace.values(), 0, 0),
        peak_bytes=backbone_bytes + table_bytes + sum(adapters) + optimizers + everything,
        process_peak_bytes=process_peak_bytes(),
        process_start_bytes=process_start_bytes,
        device_peak_bytes=device_peak_bytes,
    )


def peaks(
    actions: Sequence[Action],
    microbatches: Sequence[int],
    seen: ActionBytes,
    gradient_bytes: Sequence[int],
    carries: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Most bytes over a stage's actions: of open micro-batches alone, and of all that comes and goes.

    A micro-batch is open from its F to the end of its B; one that was not counted is taken to keep what the
    last counted one of its position in a step kept. Gradients live from an hTask's first B to its STEP; those
    of what a carry group has left, from its first B to its last, which is the B of its first micro-batch.
    """
    of_position = {(h, number % microbatches[h]): kept for (h, number), kept in sorted(seen.kept.items())}
    group = carries or [1] * len(microbatches)
    open_bytes = alone = everything = 0
    gradients: dict[int, int] = {}
    messages = iter(seen.messages)
    for action in actions:
        h = action.htask
        if action.kind == "STEP":
            gradients.pop(h, None)
            continue
        own = seen.kept.get((h, action.number), of_position[h, action.number % microbatches[h]])
        message = next(messages)
        if action.kind == "F":
            open_bytes += own
            workspace = seen.forward_workspace.get(h, 0)
        else:
            workspace = seen.backward_workspace.get(h, 0)
        alone = max(alone, open_bytes)
        everything = max(everything, open_bytes + sum(gradients.values()) + message + workspace)
        if action.kind == "B":
            open_bytes -= own
            gradients[h] = gradient_bytes[h]
            position = action.number % group[h]
            if group[h] > 1 and position in {0, group[h] - 1}:
                open_bytes += seen.left_gradients.get(h, 0) * (1 if position else -1)
            everything = max(everything, open_bytes + sum(gradients.values()) + message)
    return alone, everything
