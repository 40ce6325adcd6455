"""Plans whose durations come from the costs, by another way than the simulator's."""

from __future__ import annotations

from functools import cache

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.compose import step_seconds
from muxtune.graph import Launching, stage_graph, time_graph
from muxtune.graph.operators import Phase
from muxtune.model import PRESETS
from muxtune.orchestration import Mode, launch_graph, schedule_clock
from muxtune.plan import Orchestration, Plan, check_plan, finish_plan, predict_plan, stage_times
from muxtune.plan.predicted import ClockSeconds
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.works import sample_works
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import ClockKind, Template, build_schedule, evaluate_schedule, shared_clocks
from tests.muxtune.planning.problems import MIXED, make_workload
from tests.plans import changed, entries

MODEL = PRESETS["llama2-7b"].model_copy(update={"layers": 4})
CLUSTER = load_cluster("testbed-a")
BUCKETS = ((0, 2), (1,))


@cache
def costs() -> AnalyticCosts:
    """Of the cluster."""
    return AnalyticCosts("a40", MODEL, interconnect_of(CLUSTER))


@cache
def problem(contention: float | None = None) -> PlanningProblem:
    """Five tasks on four A40, on which somebody has measured the contention."""
    given = costs() if contention is None else _Contended("a40", MODEL, interconnect_of(CLUSTER))
    if isinstance(given, _Contended):
        given.measured = contention
    return PlanningProblem(make_workload(MIXED), MODEL, CLUSTER, given)


class _Contended(AnalyticCosts):
    """Costs of which the contention is known."""

    measured: float | None = None

    @property
    def contention(self) -> float | None:
        return self.measured


@cache
def orchestrated_plan(
    mode: Mode, *, tp: int = 2, pp: int = 2, template: Template = "flush", contention: float = 0.2
) -> Plan:
    """Three hTasks, two of which share a bucket."""
    groups = (("t0", "t3"), ("t1",), ("t2", "t4"))
    structure = PlanStructure(
        htasks=tuple(HTaskChoice(task_ids=ids, shape=problem().shape(ids, "pack")) for ids in groups),
        buckets=BUCKETS,
        template=template,
        mesh=Mesh((MODEL.layers // pp,) * pp, tp),
    )
    base = assemble_plan(problem(), structure, "muxtune")
    orchestration = Orchestration(mode=mode, contention=contention)
    iterations = base.predicted.scheduled_iterations
    actions = build_schedule(
        BUCKETS,
        base.microbatches,
        pp=pp,
        template=template,
        steps=[iterations] * 3,
        co_scheduled=orchestration.shares_clocks,
    )
    shared = shared_clocks(BUCKETS, base.microbatches) if orchestration.shares_clocks else []
    update: dict[str, object] = {
        name: tuple(
            tuple(_clock_s(structure, stage, (kind, (h,)), orchestration) for h in range(3))
            for stage in range(pp)
        )
        for name, kind in (("fwd_s", "F"), ("bwd_s", "B"))
    }
    update["clock_s"] = tuple(
        ClockSeconds(
            kind=kind,
            htasks=htasks,
            seconds=tuple(_clock_s(structure, s, (kind, htasks), orchestration) for s in range(pp)),
        )
        for htasks in shared
        for kind in ("F", "B")
    )
    plan = changed(
        base,
        orchestration=orchestration,
        schedule=entries(actions),
        predicted=base.predicted.model_copy(update=update),
    )
    timeline = evaluate_schedule(plan.actions, stage_times(plan))
    plan = finish_plan(changed(plan, predicted=predict_plan(plan, timeline)))
    check_plan(plan)
    return plan


@cache
def launched_plan(
    mode: Mode, *, pp: int = 2, contention: float = 0.2, adapters: Launching = "grouped"
) -> Plan:
    """The same as the planner makes it, with launch orders."""
    groups = (("t0", "t3"), ("t1",), ("t2", "t4"))
    structure = PlanStructure(
        htasks=tuple(HTaskChoice(task_ids=ids, shape=problem().shape(ids, "pack")) for ids in groups),
        buckets=BUCKETS,
        template="flush",
        mesh=Mesh((MODEL.layers // pp,) * pp, tp=2),
        orchestration=Orchestration(mode=mode, contention=contention, adapters=adapters),
    )
    return assemble_plan(problem(contention), structure, "muxtune")


def _clock_s(structure: PlanStructure, stage: int, kind: ClockKind, orchestration: Orchestration) -> float:
    """Subgraph by subgraph, and the shares of the optimizer steps."""
    direction, htasks = kind
    mesh = structure.mesh
    layers = mesh.layers_per_stage[stage]
    phase: Phase = "fwd" if direction == "F" else "bwd"
    works = [sample_works(structure.htasks[h], problem().data).mean for h in htasks]
    graphs = [
        time_graph(
            stage_graph(
                MODEL, layers, first=stage == 0, last=stage == mesh.pp - 1, work=work, phase=phase, tp=mesh.tp
            ),
            costs(),
            phase,
        )
        for work in works
    ]
    cuts = [launch_graph(graph) for graph in graphs]
    seconds = schedule_clock(cuts, orchestration.mode, orchestration.contention).seconds
    if direction == "B":
        for h, work in zip(htasks, works, strict=True):
            steps = [step_seconds(costs(), MODEL, layers, lora, tp=mesh.tp) for lora in work.pefts]
            seconds += sum(steps) / structure.microbatches[h]
    return seconds
