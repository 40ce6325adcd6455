"""Policies: from a workload, a backbone, a cluster and costs to a plan."""

from muxtune.policies import (  # noqa: F401  # they register themselves
    exhaustive,
    hf_peft,
    instances,
    lorafusion,
    mlora,
    muxtune,
    shared,
    switches,
)
from muxtune.policies.base import POLICIES, Policy
from muxtune.policies.chosen import ChosenPolicy, choose_policy
from muxtune.policies.finalists import plan_problem, plan_workload
from muxtune.policies.muxtune import explain_muxtune
from muxtune.policies.shared import fixed_partition, refuse_partition

__all__ = [
    "POLICIES",
    "ChosenPolicy",
    "Policy",
    "choose_policy",
    "explain_muxtune",
    "fixed_partition",
    "plan_problem",
    "plan_workload",
    "refuse_partition",
]
