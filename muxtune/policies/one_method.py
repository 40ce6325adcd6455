"""``muxtune`` without hTasks that mix PEFT methods, as the paper's early code has it.

There an hTask holds tasks of one method, for its adapters ran as one module. What mixing buys is the
difference to ``muxtune``; everything else is searched in the same way.
"""

from __future__ import annotations

from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions, parse_partition
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies.base import POLICIES
from muxtune.support.errors import SpecError

NAME = "muxtune-one-method-per-htask"


@POLICIES.register(NAME)
class OneMethodPerHTask:
    """Methods are told apart by their names alone: LoRA of any rank is one method."""

    summary = "muxtune, but the tasks of an hTask have one PEFT method"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """What ``muxtune`` proposes if no hTask may mix methods.

        Raises:
            SpecError: The partition is fixed and mixes methods, or nothing fits the memory.
        """
        methods = {task_id: data.task.peft.method for task_id, data in problem.data.items()}
        if options.partition is not None:
            for group in parse_partition(options.partition, methods):
                found = sorted({methods[task_id] for task_id in group})
                if len(found) > 1:
                    expected = f"hTasks of one PEFT method; {'+'.join(group)} has {' and '.join(found)}"
                    raise SpecError("--partition", options.partition, expected)
        # Of one method, it is the very search of muxtune, which may be known already.
        apart = replace(options, one_method=len(set(methods.values())) > 1)
        return POLICIES.get("muxtune").propose(problem, apart)
