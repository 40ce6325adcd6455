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
from muxtune.planning.decisions.structure import SEQUENTIAL, HTaskChoice, PlanStructure
from muxtune.planning.exact.seconds import StageKind
from muxtune.planning.problem.assemble import structure_iteration_s, structure_schedule
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.search import SearchRecord
from muxtune.planning.search.tried import best_of_each
from muxtune.schedule import iteration_clocks

MOST_SHOWN = 4
"""Other choices of a decision that are shown for the winner's mesh."""


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
    """``mesh``, ``hTasks``, ``alignment``, ``buckets``, ``template`` or ``orchestration``."""
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
    """Mesh by mesh, then what else was tried for each decision on the winner's mesh; each fastest first."""
    not_played: dict[str, float]
    """Meshes whose partitions all stood too far back by estimate, with the least guess at an iteration in
    seconds."""
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
    """Compare the winner with the best that other decisions led to, among what the search has tried.

    Args:
        problem: Problem that was planned.
        record: Record of the search.
        winner: Structure that was taken in the end; by default the best.
    """
    best = winner or record.structures[0]
    parts = iteration_parts(problem, best)
    rows: list[RunnerUp] = []
    groups: dict[str, list[RunnerUp]] = {}
    for differs_in, choice, structure in _others(record, best):
        row = _compare(problem, parts, differs_in, choice, structure)
        groups.setdefault(differs_in, []).append(row)
    for each in groups.values():
        rows += sorted(each, key=lambda row: row.iteration_s)
    return Explanation(
        winner=describe(best),
        iteration_s=parts.iteration_s,
        parts=parts,
        runners_up=tuple(rows),
        not_played=_not_played(record),
        partitions=len(record.proposals),
        looked_at=len(record.outcomes),
    )


def _not_played(record: SearchRecord) -> dict[str, float]:
    played = {str(structure.mesh) for _, structure in record.tried}
    least_s: dict[str, float] = {}
    for proposal in sorted(record.proposals, key=lambda each: each.expected_s):
        if str(proposal.mesh) not in played:
            least_s.setdefault(str(proposal.mesh), proposal.expected_s)
    return least_s


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
    mode = structure.orchestration.mode
    inside = "" if mode == SEQUENTIAL.mode else f", {mode}"
    return f"{_shape(structure)}, {_htasks(structure)}, {_layouts(structure)}, {structure.template}{inside}"


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


def _others(record: SearchRecord, best: PlanStructure) -> Iterator[tuple[str, str, PlanStructure]]:
    """What else the search has tried, and the best structure that it led to: a decision at a time."""
    tried = list(record.tried)

    def count(structure: PlanStructure) -> str | None:
        alike = structure.mesh == best.mesh and len(structure.htasks) != len(best.htasks)
        return _htasks(structure) if alike else None

    def alignment(structure: PlanStructure) -> str | None:
        alike = structure.mesh == best.mesh and _groups(structure) == _groups(best)
        return _layouts(structure) if alike and _layouts(structure) != _layouts(best) else None

    def buckets(structure: PlanStructure) -> str | None:
        alike = replace(structure, buckets=best.buckets) == best and structure != best
        return f"buckets of {' + '.join(str(len(bucket)) for bucket in structure.buckets)}" if alike else None

    def template(structure: PlanStructure) -> str | None:
        alike = structure.mesh == best.mesh and structure.htasks == best.htasks
        return structure.template if alike and structure.template != best.template else None

    def mode(structure: PlanStructure) -> str | None:
        alike = structure.mesh == best.mesh and structure.htasks == best.htasks
        name = structure.orchestration.mode
        return name if alike and name != best.orchestration.mode else None

    meshes = best_of_each(tried, lambda each: None if each.mesh == best.mesh else _shape(each))
    for _, structure in meshes.values():
        yield "mesh", f"{_shape(structure)}, {_htasks(structure)}", structure
    kinds = {
        "hTasks": count,
        "alignment": alignment,
        "buckets": buckets,
        "template": template,
        "orchestration": mode,
    }
    for differs_in, kind in kinds.items():
        for choice, (_, structure) in list(best_of_each(tried, kind).items())[:MOST_SHOWN]:
            yield differs_in, choice, structure


def _shape(structure: PlanStructure) -> str:
    return str(structure.mesh)


def _htasks(structure: PlanStructure) -> str:
    return f"{len(structure.htasks)} hTasks"


def _groups(structure: PlanStructure) -> set[tuple[str, ...]]:
    return {htask.task_ids for htask in structure.htasks}


def _layouts(structure: PlanStructure) -> str:
    return ", ".join(dict.fromkeys(sorted(str(htask.layout) for htask in structure.htasks)))
