"""The operators of a plan's clocks, priced again and put in the order in which the plan launches them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from muxtune.costs.base import CostModel
from muxtune.costs.compose import MicrobatchWork, p2p_seconds, step_seconds
from muxtune.graph import StageGraph, TimedNode, stage_graph, time_graph
from muxtune.graph.operators import Phase
from muxtune.orchestration import LaunchOrder, launch_graph, replay_clock, schedule_clock
from muxtune.plan import Plan
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.exact.seconds import StageKind, stage_kinds
from muxtune.planning.exact.slowest_replica import SlowestReplicas
from muxtune.planning.exact.works import HTaskWorks, sample_works
from muxtune.schedule import ClockKind, ClockTimes, StageTimes, shared_clocks
from muxtune.tasks import load_task_data, load_tokenizer
from sim.engine import ClockActions, clock_htasks, clock_kind
from sim.orchestrated import orchestrated_program
from sim.program import Program
from sim.streams import program_seconds

_PHASES: dict[Literal["F", "B"], Phase] = {"F": "fwd", "B": "bwd"}


class PlanPrograms:
    """Programs of a plan, built when they are first asked for. Reads the datasets.

    The plan's launch orders are replayed; clocks that it has none of are scheduled as the planner does it.

    Args:
        plan: Plan that has been checked.
        costs: Prices of operators on its devices, for its whole backbone.

    Raises:
        UserError: A dataset cannot be read.
    """

    def __init__(self, plan: Plan, costs: CostModel) -> None:
        self._plan = plan
        self._costs = costs
        tokenizer = None
        if any(task.dataset.path is not None for task in plan.tasks):
            tokenizer = load_tokenizer(plan.model)
        data = {task.id: load_task_data(task, plan.model, tokenizer) for task in plan.tasks}
        self._works: list[HTaskWorks] = []
        for htask in plan.htasks:
            choice = HTaskChoice(task_ids=htask.task_ids, shape=plan.shape(htask.id), instance=htask.instance)
            self._works.append(sample_works(choice, data))
        self._kinds = stage_kinds(plan.model, plan.pefts, plan.parallelism.layers_per_stage, plan.placement)
        self._work = lru_cache(maxsize=None)(self._find_work)
        self._program = lru_cache(maxsize=None)(self._find)
        self._alike = lru_cache(maxsize=None)(self._build)
        self._graph = lru_cache(maxsize=None)(self._time)

    def __call__(self, stage: int, clock: ClockActions) -> Program:
        """What a stage runs in a clock."""
        return self._program(stage, (clock_kind(clock), clock_htasks(clock)))

    def times(self) -> StageTimes:
        """What whole clocks take when their programs are played one by one."""
        plan = self._plan
        htasks = range(len(plan.htasks))
        clocks = None
        if plan.orchestration.shares_clocks:
            kinds: list[ClockKind] = [
                (kind, shared)
                for shared in shared_clocks(plan.buckets, plan.microbatches)
                for kind in ("F", "B")
            ]
            clocks = ClockTimes(
                buckets=plan.buckets,
                microbatches=plan.microbatches,
                seconds={kind: self._clock_s(kind) for kind in kinds},
            )
        fwd_s = [self._clock_s(("F", (h,))) for h in htasks]
        bwd_s = [self._clock_s(("B", (h,))) for h in htasks]
        return StageTimes(
            fwd_s=list(zip(*fwd_s, strict=True)),
            bwd_s=list(zip(*bwd_s, strict=True)),
            p2p_s=[self._p2p_s(h) for h in htasks],
            clocks=clocks,
        )

    def _clock_s(self, kind: ClockKind) -> list[float]:
        contention = self._plan.orchestration.contention
        programs = [self._program(stage, kind) for stage in range(len(self._kinds))]
        seconds = {id(each): program_seconds(each, contention) for each in programs}
        return [seconds[id(each)] for each in programs]

    def _p2p_s(self, htask: int) -> float:
        tokens = self._plan.htasks[htask].tokens_per_microbatch
        return p2p_seconds(self._costs, self._plan.model, tokens, self._plan.placement.message_routes())

    def _find_work(self, stage: StageKind, htask: int) -> MicrobatchWork:
        """An average micro-batch of the replica that is slowest on such a stage."""
        works, adapters = self._works[htask], self._plan.orchestration.adapters
        costs, tp = self._costs.with_adapters(adapters), self._plan.parallelism.tp
        slowest = SlowestReplicas(works, costs, self._plan.model, tp=tp, adapters=adapters)
        choice = slowest.on_stage(stage.layers, first=stage.first, last=stage.last)
        return works.of(choice)

    def _find(self, stage: int, kind: ClockKind) -> Program:
        """Stages of one kind with one order share a program."""
        direction, htasks = kind
        order = self._plan.launch_order(stage, _PHASES[direction], htasks)
        return self._alike(self._kinds[stage], kind, order)

    def _build(self, stage: StageKind, kind: ClockKind, order: LaunchOrder | None) -> Program:
        direction, htasks = kind
        graphs = [self._graph(stage, _PHASES[direction], h) for h in htasks]
        program = self._orchestrate(graphs, htasks, order)
        if direction == "F":
            return program
        return program.then(Program.in_turn((h, self._step_share(stage, h)) for h in htasks))

    def _orchestrate(
        self, graphs: Sequence[StageGraph[TimedNode]], htasks: Sequence[int], order: LaunchOrder | None
    ) -> Program:
        orchestration = self._plan.orchestration
        nodes = [graph.expand() for graph in graphs]
        if orchestration.mode == "sequential":
            return Program.in_turn(zip(htasks, nodes, strict=True))
        cuts = [launch_graph(graph, orchestration.adapters) for graph in graphs]
        if order is None:
            schedule = schedule_clock(cuts, orchestration.mode, orchestration.contention)
        else:
            schedule = replay_clock(cuts, order, orchestration.mode, orchestration.contention)
        return orchestrated_program(schedule, [graph.cut for graph in cuts], nodes, htasks)

    def _time(self, stage: StageKind, phase: Phase, htask: int) -> StageGraph[TimedNode]:
        graph = stage_graph(
            self._plan.model,
            stage.layers,
            first=stage.first,
            last=stage.last,
            work=self._work(stage, htask),
            phase=phase,
            tp=self._plan.parallelism.tp,
            adapters=self._plan.orchestration.adapters,
        )
        return time_graph(graph, self._costs, phase)

    def _step_share(self, stage: StageKind, htask: int) -> list[TimedNode]:
        """What a backward has of the optimizer step, as :mod:`muxtune.schedule.recurrence` counts it."""
        model, tp, m = self._plan.model, self._plan.parallelism.tp, self._plan.microbatches[htask]
        seconds = [
            step_seconds(
                self._costs,
                model,
                stage.layers,
                task.peft,
                tp=tp,
                replicas=stage.replicas,
                first=stage.first,
            )
            for task in self._plan.htask_tasks(htask)
        ]
        return [
            TimedNode(f"optimizer {task}", "compute", each / m, role="adapter")
            for task, each in enumerate(seconds)
        ]
