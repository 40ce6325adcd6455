"""HF PEFT: an instance per task on a backbone of its own, with unfused adapters in a GPipe-like pipeline.

What a provider gets by starting ``transformers`` with ``peft`` once per task (a baseline of the paper,
section 5.1). Every low-rank product is an operation of its own; sequences are padded to the task's declared
length. The pipeline plays all forwards of a step and then all backwards (GPipe, arXiv 1811.06965). A single
stage has nothing to fill: a step's micro-batches accumulate their gradients one after the other.
"""

from __future__ import annotations

from dataclasses import replace

from muxtune.plan import Orchestration
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order
from muxtune.policies.base import POLICIES
from muxtune.policies.instances import task_instances
from muxtune.policies.shared import refuse_partition

_UNFUSED = Orchestration(adapters="separate")


@POLICIES.register("hf-peft")
class HfPeft:
    """Every task is an instance of its own with its own copy of the backbone; the instances take turns."""

    summary = "one instance per task with its own backbone, padded, unfused adapters, GPipe"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure per mesh: the tasks one after the other."""
        refuse_partition(options, "hf-peft")

        def build(fixed: PlanOptions) -> list[PlanStructure]:
            htasks, mesh = task_instances(problem, fixed)
            template = fixed.template or ("gpipe" if mesh.pp > 1 else "flush")
            return [replace(in_order(htasks, mesh, template), orchestration=_UNFUSED)]

        return on_every_mesh(problem, options, build)
