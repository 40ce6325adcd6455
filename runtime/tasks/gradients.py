"""Gradients of adapters, once per optimizer step: summed over ranks in one message, and their norms."""

# K tasks of an hTask

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtime.device.torch_internals import tensor_norms
from runtime.distributed.sharding import Portion
from runtime.distributed.teams import Team
from runtime.tasks.tenant import Tenant


def sum_over_shards(tenants: Sequence[Tenant], team: Team) -> None:
    """Complete the gradients of which each tensor-parallel rank has a part: the terms of its features.

    Where ranks hold overlapping parts, each part is summed at its place in the whole tensor.
    """
    held = [
        (parameter, portion)
        for tenant in tenants
        for parameter, portion in zip(tenant.parameters.values(), tenant.portions.values(), strict=True)
        if portion.partial
    ]
    whole = [_placed(parameter, portion) for parameter, portion in held]
    for (parameter, portion), total in zip(held, _sums(whole, team), strict=True):
        parameter.grad = portion.take(total)


def sum_over_replicas(tenants: Sequence[Tenant], team: Team, flags_K: Tensor) -> Tensor:
    """Add up the gradients of all replicas, each of which has those of its sequences.

    Args:
        tenants: Whose gradients.
        team: The replicas.
        flags_K: A small number for each tenant, which takes the same way.

    Returns:
        The sums of the flags.
    """
    parameters = [parameter for tenant in tenants for parameter in tenant.parameters.values()]
    *totals, flags_K = _sums([*(_gradient(p) for p in parameters), flags_K], team)
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total
    return flags_K


def squared_gradient_norms(tenants: Sequence[Tenant]) -> Tensor:
    """Sum of squares of each task's gradients on this rank; its share of what others of the stage hold too.

    All tensors of all tasks in one call, as there are dozens per task and layer, and nothing waits for it.

    Returns:
        ``[K]`` in float64, on the device of the gradients.
    """
    total_K = torch.zeros(len(tenants), dtype=torch.float64, device=tenants[0].device)
    held = [
        [(p.grad, tenant.portions[key].holders) for key, p in tenant.parameters.items() if p.grad is not None]
        for tenant in tenants
    ]
    for holders in sorted({n for each in held for _, n in each}):
        shared = [[gradient for gradient, n in each if n == holders] for each in held]
        norms = tensor_norms([gradient for each in shared for gradient in each], torch.float64)
        squares = torch.stack(norms).square().split([len(each) for each in shared])
        total_K += torch.stack([part.sum() for part in squares]) / holders
    return total_K


def _placed(parameter: nn.Parameter, portion: Portion) -> Tensor:
    gradient = _gradient(parameter)
    if portion.whole:
        return gradient
    whole = portion.whole_like(gradient)
    portion.put(gradient, whole)
    return whole


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros if none of the rank's sequences touched the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _sums(tensors: Sequence[Tensor], team: Team) -> list[Tensor]:
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    team.sum_(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    # The message has the widest dtype: biases of a bfloat16 backbone are not in the factors' float32.
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]
