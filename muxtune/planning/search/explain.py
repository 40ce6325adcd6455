"""Why the winner of a search won: what its runners-up lose, and on what.

The time of an iteration is what every rank of the cluster spends in it, so on average over the ranks

    iteration = working + padding + communication + waiting

working        operators on the share of the tokens that are of examples. For the same tokens, a plan that
               works longer uses its operators less well (or has some of them on several ranks)
padding        operators on the other tokens
communication  collectives and messages that nothing hides
waiting        the rest: bubbles, uneven stages, and ranks without a stage

A runner-up is slower by the differences of the four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from muxtune.graph import node_seconds, stage_graph, step_graph
from muxtune.graph.operators import LINK_KINDS, PHASES
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import SEQUENTIAL, HTaskChoice, PlanStructure
from muxtune.planning.exact.seconds import StageKind
from muxtune.planning.problem.assemble import structure_iteration_s, structure_schedule
from muxtune.planning.problem.layouts import alignment_candidates, cheapest_layout
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import fastest_schedule, overlapping
from muxtune.planning.search.search import SearchRecord
from muxtune.schedule import iteration_clocks

COUNTS_SHOWN = 4
"""Other numbers of hTasks that are shown for the winner's mesh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationParts:
    """Seconds of an iteration, on average over all ranks of the cluster."""

    working_s: float
    padding_s: float
    communication_s: float
    waiting_s: float

    @property
    def iteration_s(self) -> float:
        """Sum of the four parts."""
        return self.working_s + self.padding_s + self.communication_s + self.waiting_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A plan that is not the winner."""

    differs_in: str
    """``mesh``, ``hTasks``, ``alignment``, ``template`` or ``orchestration``."""
    choice: str
    """Decision in which it differs, in words."""
    iteration_s: float
    slower: float
    """Seconds more than the winner, as a share of the winner's iteration."""
    utilisation_s: float
    """Seconds lost by operators that are used less well; negative where they are used better."""
    padding_s: float
    communication_s: float
    bubble_s: float
    missing_bytes: int
    """Bytes of memory that the stage that needs most lacks; 0 if it fits."""

    @property
    def lost_on(self) -> str:
        """The largest of its losses, in a word."""
        if self.missing_bytes:
            return "memory"
        losses = {
            "utilisation": self.utilisation_s,
            "padding": self.padding_s,
            "communication": self.communication_s,
            "bubble": self.bubble_s,
        }
        return max(losses, key=lambda name: losses[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A winner and its runners-up."""

    winner: str
    iteration_s: float
    parts: IterationParts
    runners_up: tuple[RunnerUp, ...]
    """Mesh by mesh, then other numbers of hTasks, alignments and templates; each fastest first."""
    partitions: int
    """Partitions that the search knew by estimate."""
    looked_at: int
    """Partitions that the search priced exactly."""

    def as_dict(self) -> dict[str, object]:
        """Content for JSON."""
        content = asdict(self)
        for row, each in zip(content["runners_up"], self.runners_up, strict=True):
            row["lost_on"] = each.lost_on
        return content


def explain_search(
    problem: PlanningProblem, record: SearchRecord, winner: PlanStructure | None = None
) -> Explanation:
    """Compare the winner with the best that other decisions lead to.

    Args:
        problem: Problem that was planned.
        record: Record of the search.
        winner: Structure that was taken in the end; by default the fastest.
    """
    best = winner or record.structures[0]
    parts = iteration_parts(problem, best)
    rows: list[RunnerUp] = []
    groups: dict[str, list[RunnerUp]] = {}
    for differs_in, choice, structure in _others(problem, record, best):
        row = _compare(problem, parts, differs_in, choice, structure)
        groups.setdefault(differs_in, []).append(row)
    for each in groups.values():
        rows += sorted(each, key=lambda row: row.iteration_s)
    return Explanation(
        winner=describe(best),
        iteration_s=parts.iteration_s,
        parts=parts,
        runners_up=tuple(rows),
        partitions=len(record.proposals),
        looked_at=len(record.outcomes),
    )


def iteration_parts(problem: PlanningProblem, structure: PlanStructure) -> IterationParts:
    """What the ranks spend an iteration on."""
    mesh = structure.mesh
    iteration_s = structure_iteration_s(problem, structure)
    busy_s = _busy_s(problem, structure)
    communication_s = busy_s - _busy_s(problem, replace(structure, orchestration=SEQUENTIAL))  # less: hidden
    for htask in structure.htasks:
        links_s = _links_s(problem, htask, structure)
        communication_s += htask.shape.microbatches * sum(links_s[kind] for kind in problem.stage_kinds(mesh))
    share = mesh.tp * mesh.dp / problem.cluster.ranks
    tokens = problem.iteration_tokens(structure)
    computing_s = share * (busy_s - communication_s)
    effective = tokens.effective / tokens.all
    return IterationParts(
        working_s=computing_s * effective,
        padding_s=computing_s * (1 - effective),
        communication_s=share * communication_s,
        waiting_s=iteration_s - share * busy_s,
    )


def _busy_s(problem: PlanningProblem, structure: PlanStructure) -> float:
    """Seconds that the stages of a replica are busy in an iteration, added up."""
    times = problem.times(structure)
    shared = structure.orchestration.shares_clocks
    rotation = iteration_clocks(structure.buckets, structure.microbatches, co_scheduled=shared)
    clocks = Counter(htasks for _, htasks in rotation)
    return sum(
        count * (sum(times.clock_s("F", htasks)) + sum(times.clock_s("B", htasks)))
        for htasks, count in clocks.items()
    )


def describe(structure: PlanStructure) -> str:
    """A structure in words."""
    alignments = ", ".join(dict.fromkeys(str(htask.layout) for htask in structure.htasks))
    count = len(structure.htasks)
    mode = structure.orchestration.mode
    inside = "" if mode == SEQUENTIAL.mode else f", {mode}"
    return f"{structure.mesh}, {count} hTasks, {alignments}, {structure.template}{inside}"


def _links_s(
    problem: PlanningProblem, htask: HTaskChoice, structure: PlanStructure
) -> dict[StageKind, float]:
    """Seconds of a micro-batch's messages and collectives, its share of the steps' included."""
    mesh, model = structure.mesh, problem.model
    costs = problem.costs if mesh.tp == 1 else problem.costs.shard(mesh.tp)
    found = {}
    for kind in dict.fromkeys(problem.stage_kinds(mesh)):
        layers, first, last, replicas = kind
        work = problem.slowest_work(htask, kind, mesh.tp)
        seconds = 0.0
        for phase in PHASES:
            graph = stage_graph(model, layers, first=first, last=last, work=work, phase=phase, tp=mesh.tp)
            seconds += sum(
                repeats * node_seconds(node, costs, phase)
                for node, repeats in graph
                if node.op.kind in LINK_KINDS
            )
        for peft in work.pefts if mesh.tp * mesh.dp > 1 else ():
            seconds += max(
                sum(
                    repeats * node_seconds(node, costs, "fwd") / htask.shape.microbatches
                    for node, repeats in step_graph(
                        model, layers, peft, tp=mesh.tp, replicas=route, first=first
                    )
                    if node.op.kind in LINK_KINDS
                )
                for route in replicas
            )
        found[kind] = seconds
    return found


def _compare(
    problem: PlanningProblem, best: IterationParts, differs_in: str, choice: str, structure: PlanStructure
) -> RunnerUp:
    parts = iteration_parts(problem, structure)
    return RunnerUp(
        differs_in=differs_in,
        choice=choice,
        iteration_s=parts.iteration_s,
        slower=parts.iteration_s / best.iteration_s - 1,
        utilisation_s=parts.working_s - best.working_s,
        padding_s=parts.padding_s - best.padding_s,
        communication_s=parts.communication_s - best.communication_s,
        bubble_s=parts.waiting_s - best.waiting_s,
        missing_bytes=_missing_bytes(problem, structure),
    )


def _missing_bytes(problem: PlanningProblem, structure: PlanStructure) -> int:
    if fits(problem, structure):
        return 0
    memory = problem.memory(structure, structure_schedule(structure))
    needed = max(stage.total_bytes for stage in memory)
    return needed - problem.cluster.device.memory_bytes


def _others(
    problem: PlanningProblem, record: SearchRecord, best: PlanStructure
) -> Iterator[tuple[str, str, PlanStructure]]:
    """What else could have been decided, and the best structure that it leads to."""
    by_mesh, by_count = _best_elsewhere(problem, record, str(best.mesh))
    for mesh, structure in by_mesh.items():
        if mesh != str(best.mesh):
            yield "mesh", f"{mesh}, {len(structure.htasks)} hTasks", structure
    for count, structure in list(by_count.items())[: COUNTS_SHOWN + 1]:
        if count != len(best.htasks):
            yield "hTasks", f"{count} hTasks", structure
    yield from _realigned(problem, best)
    for template in problem.settings.templates:
        if template != best.template:
            yield "template", template, fastest_schedule(problem, best.htasks, best.mesh, [template])
    for mode in ("sequential", *problem.settings.modes) if best.mesh.tp > 1 else ():
        if mode != best.orchestration.mode:
            yield "orchestration", mode, replace(best, orchestration=overlapping(problem, mode))


def _best_elsewhere(
    problem: PlanningProblem, record: SearchRecord, best_mesh: str
) -> tuple[dict[str, PlanStructure], dict[int, PlanStructure]]:
    """Fastest known structure of every mesh, and of some numbers of hTasks on the best mesh.

    What the search has not played is played here, the most promising partition of each kind.
    """
    by_mesh: dict[str, PlanStructure] = {}
    by_count: dict[int, PlanStructure] = {}

    def note(structure: PlanStructure) -> None:
        by_mesh.setdefault(str(structure.mesh), structure)
        if str(structure.mesh) == best_mesh:
            by_count.setdefault(len(structure.htasks), structure)

    for outcome in record.outcomes:
        if outcome.structure is not None:
            note(outcome.structure)
    for proposal in record.proposals:
        mesh = str(proposal.mesh)
        new_count = len(by_count) <= COUNTS_SHOWN and proposal.count not in by_count
        if mesh not in by_mesh or (mesh == best_mesh and new_count):
            note(
                fastest_schedule(problem, proposal.htasks(problem), proposal.mesh, problem.settings.templates)
            )
    return by_mesh, by_count


def _realigned(problem: PlanningProblem, best: PlanStructure) -> Iterator[tuple[str, str, PlanStructure]]:
    """The best structure's partition, all of it under one other alignment."""
    for alignment in ("pack", "pad", "chunk"):
        htasks = []
        for htask in best.htasks:
            wanted = alignment_candidates(problem, htask.task_ids, PlanOptions(alignment=alignment))
            htasks.append(cheapest_layout(problem, best.mesh, htask.task_ids, wanted))
        if tuple(htasks) != best.htasks:
            structure = fastest_schedule(problem, htasks, best.mesh, [best.template])
            yield "alignment", f"all {alignment}", structure
