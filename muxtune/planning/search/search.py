"""The search over meshes, layers, fusion, alignment, grouping, template and orchestration.

1. Of up to nine tasks all groups are priced by estimate, and all partitions of all meshes ranked
   (:mod:`muxtune.planning.search.all_partitions`). Of more, on every mesh all contiguous groups in two orders
   are (:mod:`muxtune.planning.estimate.group_seconds`), and dynamic programming cuts the tasks into groups:
   cheapest for every number of hTasks, and for every pace of the pipeline
   (:mod:`muxtune.planning.decisions.partition_dp`).
2. The partitions of all meshes stand in one line, by a guess at their iterations. Each has a bound that no
   schedule of it goes below if the estimates are right (:mod:`muxtune.planning.exact.bounds`).
3. From the front of the line they are priced exactly. What cannot be faster than the best so far is dropped:
   by the bound less ``slack`` before, by the exact bound after it is priced. Of the others the schedules
   are played, and the fastest that fits the memory counts (:mod:`muxtune.planning.search.quickest_schedule`).
4. The search ends after some partitions in a row that were no better; of few tasks on each mesh. One that
   would be better and does not fit is not counted if it promised to need less memory than those before.
5. Ten and eleven tasks are refined beyond contiguous groups, and fewer where what would be faster does not
   fit the memory, for there exact bytes decide (:mod:`muxtune.planning.refinement.local_search`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh, PlanStructure
from muxtune.planning.exact.bounds import exact_bounds
from muxtune.planning.problem.carrying import may_carry
from muxtune.planning.problem.layouts import cheapest_layout, packed_or_in_chunks
from muxtune.planning.problem.memory_limit import fits, fitting
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.objectives import Objective, find_objective
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order, modes_to_try
from muxtune.planning.problem.spreading import may_spread, spread_variants
from muxtune.planning.refinement.appraiser import Appraiser
from muxtune.planning.refinement.groups import GroupTable
from muxtune.planning.refinement.local_search import refined_partitions
from muxtune.planning.search.candidates import Progress, Ranking, layouts
from muxtune.planning.search.proposals import MeshProposals, Proposal
from muxtune.planning.search.quickest_schedule import Fate, QuickestSchedule
from muxtune.planning.search.tried import Tried, Valued
from muxtune.support.errors import NotEnoughMemoryError
from muxtune.support.tables import Quantity, show_bytes_down, show_bytes_up


@dataclass(frozen=True, slots=True)
class Outcome:
    """A partition that was looked at."""

    proposal: Proposal | None
    """None of a partition that refinement found."""
    fate: Fate
    bound_s: float
    """Exact bound of its iteration in seconds."""
    value: float = np.inf
    """Value of its best schedule, by default its seconds; infinite where bounds or memory ruled all out."""
    structure: PlanStructure | None = None
    """That schedule; where none fits, one that was tried."""


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """What a search looked at."""

    outcomes: tuple[Outcome, ...]
    """Fastest first; then those without a schedule, by bound."""
    proposals: tuple[Proposal, ...]
    """All partitions of all meshes, in the order in which they stood in line."""
    tried: tuple[Valued, ...]
    """All structures that were played, whether they fit the memory or not; best first."""

    @property
    def structures(self) -> list[PlanStructure]:
        """Structures that fit, fastest first."""
        return [o.structure for o in self.outcomes if o.fate == "fits" and o.structure is not None]

    @property
    def pruned(self) -> int:
        """Partitions that estimates ruled out."""
        return len(self.proposals) - len(self.outcomes)


def search_structures(
    problem: PlanningProblem,
    options: PlanOptions = FREE,
    *,
    prune: bool = True,
    patience: int | None = None,
    keep: int = 4,
    progress: Progress | None = None,
) -> SearchRecord:
    """Find the structures with the shortest iterations.

    Args:
        problem: The planning problem.
        options: Decisions that are taken away from the search; a partition is not among them.
        prune: Whether partitions are left out by their estimates and bounds; without, all are played.
        patience: Partitions in a row that may be no better than the best before the search ends, or of few
            tasks before it leaves a mesh; by default that of the settings.
        keep: Structures that will be asked for.
        progress: Is told how far the search is.

    Raises:
        SpecError: The options contradict each other or the cluster, or nothing fits the memory.
    """
    report = progress or (lambda done, of: None)
    settings = problem.settings
    few, asked = len(problem.tasks) <= settings.all_partitions_up_to, patience is not None
    objective = find_objective(options.objective)
    if not objective.is_iteration:  # bounds and estimates are of iterations
        prune, patience = False, patience or settings.patience_of_others
    search = _Search(problem, options, objective, prune=prune)
    ranking = Ranking(problem, options, report)
    shapes = candidate_meshes(problem.model, problem.cluster, options, idle=True)
    full = [shape for shape in shapes if shape.ranks == shapes[0].ranks]

    def propose_alone(below_s: float, shapes: Sequence[MeshShape]) -> list[MeshProposals]:
        """No mesh is left out because guesses say that another one is faster."""
        return [each for shape in shapes for each in ranking.propose([shape], below_s)]

    meshes = ranking.propose(full) if objective.is_iteration else propose_alone(np.inf, full)
    if prune and patience is None and few:
        least, most = settings.patience_of_few
        patience = max(least, most * 2 // max(2, len({each.mesh for each in meshes})))
    elif prune and patience is None and len(problem.tasks) >= settings.refined_below:
        patience = settings.patience
    on_each_mesh = few or not objective.is_iteration
    leaves_far = prune and few and not asked
    proposals = search.play(meshes, patience, on_each_mesh=on_each_mesh, report=report, leaves_far=leaves_far)
    # Meshes that leave ranks idle are only ranked where they may be faster.
    worth = [
        shape
        for shape in shapes
        if shape not in full and search.may_win((1 - settings.slack) * ranking.least_s(shape))
    ]
    fewer: list[MeshProposals] = []
    if worth:
        # What a smaller cluster finds on a mesh must be found here, too, whatever guesses say of others.
        fewer = propose_alone(search.best if prune else np.inf, worth)
        if prune and few and not asked:
            patience = settings.patience_of_few[1]
        proposals += search.play(
            fewer, patience, on_each_mesh=True, alone=True, report=report, leaves_far=leaves_far
        )
    short = not np.isfinite(search.best)
    if prune and few:  # many tasks fill a pipeline as they are
        if may_spread(options):
            search.spread()
        search.reorder()
    # Refinement plays stages one operator after the other.
    sequential = options.orchestration is None or options.orchestration == "sequential"
    if prune and len(problem.tasks) < settings.refined_below and sequential:
        every = not few
        near = search.worth_refining(meshes, every=every, within=settings.refine_within)
        near += search.worth_refining(fewer, every=every, within=1.0)
        search.refine(near, layouts(problem, list(problem.data), options))
    report(1, 1)
    all_meshes = [each.mesh for each in [*meshes, *fewer]]
    if short and prune and few and sequential:  # nothing fits but what is spread
        search.refine(dict.fromkeys(all_meshes), layouts(problem, list(problem.data), options), widely=True)
    if few and not np.isfinite(search.best) and sequential:
        search.try_least_memory(all_meshes, layouts(problem, list(problem.data), options))
    if not np.isfinite(search.best):
        _refuse(problem, meshes, search)
    return SearchRecord(tuple(search.ranked(keep)), tuple(proposals), tuple(search.tried.best_first()))


def _refuse(problem: PlanningProblem, meshes: Sequence[MeshProposals], search: _Search) -> None:
    """Say what is missing, by what was tried or else by every task in an hTask of its own.

    Raises:
        SpecError: Always.
    """
    tried = [o.structure for o in search.outcomes if o.structure is not None]
    if tried:
        fitting(problem, tried[: problem.settings.patience])
    longest = max(meshes, key=lambda each: (each.shape.pp * each.shape.tp, each.shape.pp)).mesh
    alone = [
        HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), "pack", dp=longest.dp))
        for task_id in problem.data
    ]
    structure = in_order(alone, longest, "flush")
    if len(alone) <= 2 * problem.settings.widest_group:
        fitting(problem, [structure])
    memory = problem.memory(structure)  # by a bound: the schedule of more would take long to walk through
    needed = max(stage.total_bytes for stage in memory)
    field = f"cluster.device.memory_bytes of {problem.cluster.name}"
    has = Quantity(show_bytes_down(problem.cluster.device.memory_bytes))
    expected = (
        f"at least {show_bytes_up(needed)}, what {longest} needs with every task in an hTask of its own"
    )
    raise NotEnoughMemoryError(field, has, expected, needed, needed)


def _reordered(problem: PlanningProblem, htask: HTaskChoice, task_ids: Sequence[str], dp: int) -> HTaskChoice:
    microbatches = htask.shape.microbatches
    shape = problem.shape(task_ids, *htask.layout, dp=dp, microbatches=microbatches)
    return HTaskChoice(task_ids=tuple(task_ids), shape=shape, instance=htask.instance)


class _Search:
    def __init__(
        self,
        problem: PlanningProblem,
        options: PlanOptions,
        objective: Objective,
        *,
        prune: bool,
    ) -> None:
        self._problem = problem
        self._leanest_first = objective.name == "memory"
        self._one_method = options.one_method
        self._templates = options.templates(problem.settings.templates)
        self._modes = modes_to_try(problem, options)
        self._cut = may_carry(options) and len(problem.tasks) <= problem.settings.all_partitions_up_to
        self._widely = may_spread(options)
        self._chunks = options.alignment is None and may_carry(options)
        self.tried = Tried(problem, objective)
        self._prune = prune
        self._quickest = QuickestSchedule(
            problem,
            self._templates,
            self._modes,
            options.orchestration if self._modes else None,
            self.tried,
            prune=self._prune,
        )
        self.best = np.inf
        self.outcomes: list[Outcome] = []

    def least_s(self, proposal: Proposal, bound_s: float) -> float:
        """Lower bound that remains of ``bound_s`` if operators of a stage may overlap."""
        mesh = proposal.mesh
        share = self._quickest.least_share(mesh, proposal.least_share) if self._overlaps(mesh) else 1.0
        return bound_s * share

    def may_win(self, least_s: float) -> bool:
        """Whether something that takes no less may be faster than the best so far."""
        return not self._prune or least_s < self.best

    def play(
        self,
        meshes: Sequence[MeshProposals],
        patience: int | None,
        *,
        on_each_mesh: bool,
        report: Progress,
        alone: bool = False,
        leaves_far: bool = False,
    ) -> list[Proposal]:
        """Look at partitions in the order of their expected iterations, as long as there is patience.

        Args:
            meshes: Meshes with their partitions.
            patience: Partitions in a row that may be no better than the best; any number if absent.
            on_each_mesh: Whether patience is for each mesh.
            report: Is told how far it is.
            alone: Whether a mesh has patience as if there were no others: a partition must be no better than
                the mesh's own best to try it. So what is found on a mesh does not depend on larger ones.
            leaves_far: Whether meshes that are far from the best are left after fewer partitions.

        Returns:
            The partitions in their order.
        """
        settings = self._problem.settings
        few = len(self._problem.data) <= settings.all_partitions_up_to
        slack = settings.slack_of_few if few and not alone else settings.slack
        proposals = sorted(
            (proposal for each in meshes for proposal in each.proposals),
            key=lambda p: p.needed_bytes if self._leanest_first else (not p.has_room, p.expected_s),
        )
        in_vain: Counter[tuple[Mesh | None, bool]] = Counter()
        too_much: dict[tuple[Mesh | None, bool], float] = {}  # least estimate of what did not fit
        own_best: dict[tuple[Mesh | None, bool], float] = {}
        looked_at: Counter[tuple[Mesh | None, bool]] = Counter()
        for number, proposal in enumerate(proposals):
            if self._prune and self.least_s(proposal, proposal.bound_s) * (1 - slack) >= self.best:
                continue
            kind = (proposal.mesh if on_each_mesh else None, proposal.has_room)
            leaner = proposal.needed_bytes <= settings.less_memory * too_much.get(kind, 0.0)
            far = leaves_far and own_best.get(kind, np.inf) > settings.far * self.best
            if not leaner and (
                in_vain[kind] == patience or (far and looked_at[kind] >= settings.patience_far)
            ):
                continue
            before = self.best
            outcome = self.look_at(proposal)
            looked_at[kind] += outcome.fate != "memory"
            best_here = outcome.value < own_best.get(kind, np.inf)
            if best_here:
                own_best[kind] = outcome.value
            if self.best < before or (alone and best_here):
                in_vain[kind] = 0
            elif outcome.fate == "memory" and (leaner or kind not in too_much):
                too_much[kind] = proposal.needed_bytes
            elif not (alone and outcome.fate == "bound"):
                in_vain[kind] += 1
            report(len(meshes) + number + 1, len(meshes) + len(proposals))
        return proposals

    def _overlaps(self, mesh: Mesh) -> bool:
        return mesh.tp > 1 and bool(self._modes)

    def look_at(self, proposal: Proposal) -> Outcome:
        """Price a partition and play its schedules, unless its bound rules that out.

        If they do not fit, the same hTasks are tried in the streams that are shortest.
        """
        few = len(self._problem.data) <= self._problem.settings.all_partitions_up_to
        htasks = proposal.htasks(self._problem, alternatives=few)
        if few and self._chunks:
            htasks = [packed_or_in_chunks(self._problem, proposal.mesh, htask) for htask in htasks]
        outcome = self._look_at(proposal, htasks)
        if outcome.fate == "memory":
            shortest = proposal.shortest_htasks(self._problem)
            if shortest != htasks:
                leaner = self._look_at(proposal, shortest)
                outcome = leaner if leaner.fate == "fits" else outcome
        self._note(outcome)
        return outcome

    def _look_at(self, proposal: Proposal, htasks: Sequence[HTaskChoice]) -> Outcome:
        problem, mesh = self._problem, proposal.mesh
        times = [problem.htask_times(htask, mesh) for htask in htasks]
        run = max(htask.shape.carry for htask in htasks)
        bounds = exact_bounds(times, [htask.shape.microbatches for htask in htasks], run)
        bound_s = self.least_s(proposal, bounds.of(self._templates))
        if self._prune and bound_s >= self.best:
            return Outcome(proposal, "bound", bound_s)
        overlaps = self._overlaps(mesh)
        found = self._quickest.find(
            htasks,
            [each.slowest_s for each in times],
            mesh,
            bounds,
            overlaps=overlaps,
            share=proposal.least_share if overlaps else 1.0,
            below_s=self.best,
        )
        return Outcome(proposal, found.fate, bound_s, found.value, found.structure)

    def spread(self) -> None:
        """Spread long micro-batches of the best partitions of every mesh, and try all orders of few hTasks.

        Both help where stages wait, and neither makes the work of a stage less: partitions are left out whose
        work is not below the best.
        """
        settings = self._problem.settings
        tried: Counter[Mesh] = Counter()
        for outcome in sorted(self.outcomes, key=lambda each: each.value):
            proposal, structure = outcome.proposal, outcome.structure
            if outcome.value > settings.spread_within * self.best:
                break
            if proposal is None or structure is None or tried[proposal.mesh] == settings.spread_partitions:
                continue
            tried[proposal.mesh] += 1
            load_s = self.least_s(proposal, self._load_s(structure))
            if load_s < self.best:
                self._try_orders(outcome)
            if load_s < settings.worth_cutting * self.best:
                self._spread(proposal, structure.htasks)

    def _spread(self, proposal: Proposal, htasks: Sequence[HTaskChoice]) -> None:
        for variant in spread_variants(self._problem, htasks, proposal.mesh):
            spread = self._look_at(proposal, variant)
            self._note(spread)
            self._try_orders(spread)

    def _try_orders(self, outcome: Outcome) -> None:
        """Play hTasks one after the other in every order, from the first one on, as they go round."""
        settings, structure = self._problem.settings, outcome.structure
        if structure is None or outcome.value > settings.far * self.best or structure.pp == 1:
            return
        first, *others = range(len(structure.htasks))
        sequential = structure.orchestration.mode == "sequential"
        if not sequential or not 1 < len(others) < settings.most_ordered:
            return
        for order in permutations(others):
            buckets = tuple((htask,) for htask in (first, *order))
            ordered = replace(structure, buckets=buckets)
            seconds = self.tried.value(ordered)
            if seconds < self.best and fits(self._problem, ordered):
                self._note(Outcome(outcome.proposal, "fits", outcome.bound_s, seconds, ordered))

    def reorder(self) -> None:
        """Look at the best partition with its hTasks' tasks as the workload has them, and turned around.

        Sequences go into micro-batches task by task, so the order decides which ones share a micro-batch.
        """
        problem = self._problem
        best = min(self.outcomes, key=lambda each: each.value, default=None)
        if best is None or best.proposal is None or best.structure is None:
            return
        htasks, dp = best.structure.htasks, best.structure.mesh.dp
        position = {task_id: number for number, task_id in enumerate(problem.data)}
        others = {
            tuple(
                _reordered(problem, each, sorted(each.task_ids, key=position.__getitem__), dp)
                for each in htasks
            ),
            tuple(_reordered(problem, each, each.task_ids[::-1], dp) for each in htasks),
        }
        for reordered in sorted(others - {htasks}, key=lambda each: [htask.task_ids for htask in each]):
            self._note(self._look_at(best.proposal, reordered))

    def _load_s(self, structure: PlanStructure) -> float:
        """Work of the busiest stage, one operator after the other."""
        times = [self._problem.htask_times(htask, structure.mesh) for htask in structure.htasks]
        return exact_bounds(times, structure.microbatches).load_s

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.best = min(self.best, outcome.value)

    def worth_refining(self, meshes: Sequence[MeshProposals], *, every: bool, within: float) -> list[Mesh]:
        """Meshes for :meth:`refine`, the nearest to the best first.

        Args:
            meshes: Meshes with their partitions.
            every: All that come near the best; else those whose faster partitions do not fit the memory, or
                all meshes if nothing does.
            within: How near, as a factor on the best.
        """
        nearest: dict[Mesh, float] = {}
        for each in meshes:
            nearest.setdefault(each.mesh, np.inf)
            for proposal in each.proposals:
                least_s = self.least_s(proposal, proposal.bound_s)
                nearest[proposal.mesh] = min(nearest.get(proposal.mesh, np.inf), least_s)
        near = [mesh for mesh in nearest if nearest[mesh] <= within * self.best]
        if not every and np.isfinite(self.best):
            misfit = {
                outcome.proposal.mesh
                for outcome in self.outcomes
                if outcome.fate == "memory" and outcome.proposal and outcome.bound_s < self.best
            }
            near = [mesh for mesh in near if mesh in misfit]
        return sorted(near, key=lambda mesh: nearest[mesh])

    def refine(self, meshes: Iterable[Mesh], wanted: Sequence[Layout], *, widely: bool = False) -> None:
        """Local search with exact prices and exact memory.

        Args:
            meshes: Meshes, each by itself.
            wanted: Layouts that groups may have.
            widely: Whether long micro-batches of every partition are spread, too.
        """
        settings = self._problem.settings
        for mesh in meshes:
            appraiser = self._appraiser(mesh, wanted, widely=widely and self._widely)
            for found in refined_partitions(appraiser, settings.effort)[: settings.refined_kept]:
                bound_s = appraiser.bound_s(found.groups)
                self.outcomes.append(Outcome(None, "fits", bound_s, found.seconds, found.structure))
                self.best = min(self.best, found.seconds)

    def try_least_memory(self, meshes: Sequence[Mesh], wanted: Sequence[Layout]) -> None:
        """Look at the partitions that need least memory, among all partitions of a few tasks.

        Raises:
            SpecError: None of them fits; has the bytes of the one that needs least.
        """
        appraisers = [self._appraiser(mesh, wanted, widely=self._widely) for mesh in dict.fromkeys(meshes)]
        partitions = list(appraisers[0].table.partitions())
        least = [structure for each in appraisers for structure in each.least_structures(partitions)]
        for structure in fitting(self._problem, least):
            value = self.tried.value(structure)
            self.outcomes.append(Outcome(None, "fits", value, value, structure))
            self.best = min(self.best, value)

    def _appraiser(self, mesh: Mesh, wanted: Sequence[Layout], *, widely: bool = False) -> Appraiser:
        def align(task_ids: tuple[str, ...]) -> HTaskChoice:
            return cheapest_layout(self._problem, mesh, task_ids, wanted)

        table = GroupTable(self._problem, mesh, align, one_method=self._one_method)
        return Appraiser(table, self._templates, self.tried.value, cut=self._cut, widely=widely)

    def ranked(self, keep: int) -> list[Outcome]:
        """All outcomes, fastest first; of the ``keep`` fastest it is known whether they fit."""
        ranked = sorted(self.outcomes, key=lambda o: (o.value, o.bound_s))
        fitting_ones = 0
        for position, outcome in enumerate(ranked):
            if fitting_ones == keep or outcome.structure is None:
                break
            if outcome.fate == "slower":
                fate: Fate = "fits" if fits(self._problem, outcome.structure) else "memory"
                ranked[position] = replace(outcome, fate=fate)
            fitting_ones += ranked[position].fate == "fits"
        return ranked
