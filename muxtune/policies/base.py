"""What a policy is, and where policies are found."""

from __future__ import annotations

from typing import Protocol

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.registry import Registry


class Policy(Protocol):
    """Turns a planning problem into structures; the search prices them and keeps the best.

    Options of its own it declares as a class ``Options``, a pydantic model. Then ``options.policy_options``
    is one of these, made of ``--policy-option key=value``.
    """

    summary: str
    """One line for ``muxtune policies``."""

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """Structures worth pricing; those that exceed the memory are left out.

        Raises:
            UserError: The options contradict the policy, or nothing fits the memory.
        """
        ...


POLICIES: Registry[Policy] = Registry("policy", group="muxtune.policies", methods=("propose",), summary=True)
