"""Plans that nobody searches: decisions of an edited plan, or of a file that a person wrote."""

from __future__ import annotations

import sys
from pathlib import Path

from muxtune.api.costs import find_costs
from muxtune.api.inputs import load_inputs
from muxtune.costs.base import CostModel
from muxtune.costs.devices import device_names
from muxtune.model import ModelSpec, spec_from_hf
from muxtune.plan import Decisions, Plan, load_decisions
from muxtune.plan.by_hand import load_hand_decisions
from muxtune.support.errors import SpecError, naming
from muxtune.support.printable import one_line
from muxtune.tasks import Workload


def reprice_plan(path: Path, profile: Path | None) -> Plan:
    """The plan of a plan file's decisions, which may have been edited: all else is derived and priced anew.

    Args:
        path: The plan.
        profile: Costs; by default those that the cluster's device has, which must be the plan's.

    Raises:
        UserError: The decisions cannot be carried out, or the plan's costs are not there.
    """
    decisions = load_decisions(path)
    _check_model(decisions.model, path)
    workload = Workload(tasks=decisions.tasks)
    costs = find_costs(profile, workload, decisions.model, decisions.cluster)
    if profile is None:
        _check_default_costs(costs, decisions, path)
    from muxtune.planning.problem.problem import PlanningProblem
    from sim import price_decisions

    problem = PlanningProblem(workload, decisions.model, decisions.cluster, costs)
    return price_decisions(problem, decisions, str(path))


def _check_model(model: ModelSpec, path: Path) -> None:
    """Refuse shapes that are not those of the directory."""
    if model.source == "preset":
        return
    with naming(f"{path}: decisions"):
        stored = spec_from_hf(Path(model.source), model.dtype).model_copy(update={"name": model.name})
    for name in ModelSpec.model_fields:
        if getattr(stored, name) != getattr(model, name):
            expected = f"{getattr(stored, name)!r}, as {model.source} has it"
            raise SpecError(f"{path}: decisions.model.{name}", getattr(model, name), expected)


def _check_default_costs(costs: CostModel, decisions: Decisions, path: Path) -> None:
    """Refuse to price with other measurements than the plan's; coefficients that ship may change."""
    wanted, found = decisions.costs, costs.ref
    if wanted is None or wanted.profile_id == found.profile_id:
        return
    if wanted.kind == "estimated":
        sys.stderr.write(f"muxtune: priced with {found.profile_id}; the plan was made with estimates\n")
        return
    if wanted.device in device_names() and wanted.profile_id.startswith("analytic-"):
        text = f"priced with {found.profile_id}; the plan was made with {one_line(wanted.profile_id)}"
        sys.stderr.write(f"muxtune: {text}\n")
        return
    expected = f"{found.profile_id}, or --profile with the file of what the plan was made with"
    raise SpecError(f"{path}: decisions.costs.profile_id", wanted.profile_id, expected)


def plan_by_hand(path: Path, profile: Path | None) -> Plan:
    """The plan of a file of decisions; what it leaves open is chosen by the documented defaults.

    Raises:
        UserError: A field is wrong, or the decisions cannot be carried out.
    """
    from muxtune.planning.problem.by_hand import complete_decisions
    from muxtune.planning.problem.problem import PlanningProblem
    from sim import price_decisions

    hand = load_hand_decisions(path)
    inputs = load_inputs(hand.workload, hand.model, hand.cluster)
    costs = find_costs(profile, inputs.workload, inputs.model, inputs.cluster)
    problem = PlanningProblem(inputs.workload, inputs.model, inputs.cluster, costs)
    decisions = complete_decisions(problem, hand, str(path))
    return price_decisions(problem, decisions, str(path), part="")
