"""The policy of the paper: meshes, fusion, alignment, grouping, templates and orchestration by cost."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions, parse_partition
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.explain import Explanation, explain_search
from muxtune.planning.search.search import SearchRecord, search_structures
from muxtune.policies.base import POLICIES
from muxtune.policies.shared import fixed_partition
from muxtune.policies.switches import decided
from muxtune.support.errors import SpecError


@POLICIES.register("muxtune")
class MuxTune:
    """Spatial fusion where operators profit, temporal interleaving where the pipeline does."""

    summary = "fused and interleaved hTasks on one backbone, alignment and template by cost"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """The fastest structures of the search, or the best schedules of a partition that is fixed."""
        options = decided(options, problem.data)
        if options.partition is not None:
            return fixed_partition(problem, options, parse_partition(options.partition, problem.data))
        found = list(recorded_search(problem, options).structures)
        if options.objective == "memory":  # small micro-batches; estimates are of time
            with suppress(SpecError):  # it may lack the layouts that fit
                found += fixed_partition(problem, options, [(task_id,) for task_id in problem.data])
        return found


def recorded_search(problem: PlanningProblem, options: PlanOptions) -> SearchRecord:
    """The search of a problem under some options, kept as long as the problem is there.

    Raises:
        SpecError: See :func:`muxtune.planning.search.search.search_structures`.
    """
    key = replace(options, policy_options=None)  # of which there are none
    record = problem.searches.get(key)
    if not isinstance(record, SearchRecord):
        record = problem.searches[key] = search_structures(problem, options, progress=problem.progress)
    return record


def explain_muxtune(problem: PlanningProblem, options: PlanOptions) -> Explanation:
    """Why the policy's plan won, from the record of its search.

    Raises:
        SpecError: The partition is fixed, so there was no search, or nothing fits the memory.
    """
    options = decided(options, problem.data)
    if options.partition is not None:
        raise SpecError("--explain", True, "a fusion that is searched, without --partition or --no-fusion")
    if options.objective != "iteration":
        raise SpecError("--explain", True, "the objective iteration: what is explained is time")
    with problem.costs.exploring():
        return explain_search(problem, recorded_search(problem, options))
