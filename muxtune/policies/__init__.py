"""Policies: from a workload, a backbone, a cluster and costs to a plan."""

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh, PlanStructure
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import (  # noqa: F401  # they register themselves
    exhaustive,
    hf_peft,
    instances,
    lorafusion,
    mlora,
    muxtune,
    one_method,
    shared,
    switches,
)
from muxtune.policies.base import POLICIES, Policy
from muxtune.policies.chosen import ChosenPolicy, choose_policy
from muxtune.policies.finalists import plan_problem, plan_workload
from muxtune.policies.from_file import policy_identity
from muxtune.policies.muxtune import explain_muxtune
from muxtune.policies.shared import fixed_partition, refuse_partition

__all__ = [
    "POLICIES",
    "ChosenPolicy",
    "HTaskChoice",
    "Layout",
    "Mesh",
    "MeshShape",
    "PlanOptions",
    "PlanStructure",
    "PlanningProblem",
    "Policy",
    "candidate_meshes",
    "choose_policy",
    "explain_muxtune",
    "fixed_partition",
    "on_every_mesh",
    "plan_problem",
    "plan_workload",
    "policy_identity",
    "refuse_partition",
    "structure_iteration_s",
]
