"""The costs that a plan was made with, for whoever wants to see more than the plan says."""

from __future__ import annotations

from pathlib import Path

from muxtune.costs import AnalyticCosts, CostModel, ProfiledCosts, load_profile
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.devices import device_names
from muxtune.costs.needs import needed_kinds
from muxtune.plan import Plan
from muxtune.support.errors import SpecError


def plan_costs(plan: Plan, profile: Path | None = None) -> CostModel:
    """Find the plan's costs again.

    Args:
        plan: Plan that has been checked.
        profile: Profile that the plan was made with; without one, the coefficients that ship for its GPU.

    Raises:
        UserError: The profile cannot be read, a profile is needed, or these are other costs than the plan's.
    """
    wanted = plan.costs.profile_id
    if plan.costs.kind == "estimated":
        expected = f"a plan with measured costs; those of this one, {wanted}, are estimates"
        raise SpecError("plan: decisions.costs.kind", plan.costs.kind, expected)
    costs: CostModel
    if profile is not None:
        costs = ProfiledCosts(load_profile(profile), plan.model)
    elif plan.cluster.device.name in device_names():
        costs = AnalyticCosts(plan.cluster.device.name, plan.model, interconnect_of(plan.cluster))
    else:
        raise SpecError("profile", None, f"the file of {wanted}, which the plan was made with")
    costs = costs.of_kinds(needed_kinds((task.peft for task in plan.decisions.tasks), plan.model))
    if costs.ref.digest != plan.costs.digest:
        raise SpecError("profile", costs.ref.profile_id, f"{wanted}, which the plan was made with")
    return costs
