"""Norms of several tasks' gradients in one call are those of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from runtime.distributed.sharding import Portion
from runtime.tasks.gradients import squared_gradient_norms
from runtime.tasks.tenant import Tenant
from tests.plans import make_plan


def make_tenant(holders: Mapping[str, int], *, seed: int = 0, without: str = "") -> Tenant:
    """One tensor of 3 x 5 per key, held by so many ranks; ``without`` names one that has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {key: nn.Parameter(torch.ones(3, 5)) for key in holders}
    for key, parameter in parameters.items():
        if key != without:
            parameter.grad = torch.randn(3, 5, generator=generator)
    portions = {key: replace(Portion.all_of(p), holders=holders[key]) for key, p in parameters.items()}
    return Tenant(make_plan().tasks[0], parameters, portions)


def reference(tenant: Tenant) -> float:
    """One tensor after the other."""
    held = [
        (p.grad, tenant.portions[key].holders) for key, p in tenant.parameters.items() if p.grad is not None
    ]
    return sum(float(gradient.double().square().sum()) / n for gradient, n in held)


def test_each_task_has_its_own_norm_and_the_shares_of_what_others_hold_too():
    tenants = [
        make_tenant({"a": 1, "b": 1}, seed=1),
        make_tenant({"a": 2, "b": 1, "c": 4}, seed=2),
        make_tenant({"a": 2}, seed=3, without="a"),
        make_tenant({"a": 1, "b": 2}, seed=4, without="a"),
    ]
    together = squared_gradient_norms(tenants)
    assert together.dtype == torch.float64
    assert together.tolist() == pytest.approx([reference(tenant) for tenant in tenants], rel=1e-12)
    assert float(together[2]) == 0.0


def test_the_norm_of_a_task_has_the_same_bits_in_any_company():
    tenants = [make_tenant({"a": 1, "b": 2}, seed=seed) for seed in range(5)]
    alone = torch.cat([squared_gradient_norms([tenant]) for tenant in tenants])
    assert torch.equal(squared_gradient_norms(tenants), alone)
    assert torch.equal(squared_gradient_norms(tenants[::-1]), alone.flip(0))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_only_the_task_with_a_gradient_that_is_not_finite_has_such_a_norm(value):
    tenants = [make_tenant({"a": 1, "b": 2}, seed=seed) for seed in range(3)]
    gradient = tenants[1].parameters["b"].grad
    assert gradient is not None
    gradient[2, 4] = value
    assert squared_gradient_norms(tenants).isfinite().tolist() == [True, False, True]
