"""Policies: from a workload, a backbone, a cluster and costs to a plan."""

from muxtune.policies import instances, muxtune, shared  # noqa: F401  # they register themselves
from muxtune.policies.base import POLICIES, Policy
from muxtune.policies.search import plan_problem, plan_workload

__all__ = ["POLICIES", "Policy", "plan_problem", "plan_workload"]
