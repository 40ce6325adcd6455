"""Seconds of hTasks, alone and in clocks that they share, on every stage of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.costs.compose import ActionPrices, StreamSeconds, p2p_seconds, step_seconds
from muxtune.graph import Launching, stage_graph, time_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.operators import PHASES, Phase
from muxtune.model import ModelSpec
from muxtune.orchestration import ClockSchedule, LaunchGraph, launch_graph, schedule_clock
from muxtune.peft import LayerRuns, PeftSpec, Specs, stage_layers, stages_layers
from muxtune.placement import Placement, Route
from muxtune.plan import ClockLaunches, Orchestration, clock_launches
from muxtune.planning.decisions.structure import SEQUENTIAL, HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.slowest_replica import SlowestReplicas
from muxtune.planning.exact.works import Choice, HTaskWorks
from muxtune.schedule import ClockKind, ClockTimes, StageTimes, iteration_clocks
from muxtune.support.errors import SpecError
from muxtune.support.strict_models import MOST_SECONDS


class StageKind(NamedTuple):
    """What the price of a stage depends on; stages of one kind cost the same."""

    layers: LayerRuns
    first: bool
    last: bool
    replicas: tuple[Route, ...]
    """Links between its replicas."""


_SHORTEST_S = 1e-12
"""Shortest time of an action: less is nothing, or a mistake of the costs."""

DIRECTIONS: tuple[tuple[Literal["F", "B"], Phase], ...] = (("F", "fwd"), ("B", "bwd"))
"""Kinds of actions and their phases."""


@dataclass(frozen=True, slots=True)
class HTaskTimes:
    """What one micro-batch of an hTask costs on every stage, if no other hTask shares its clock."""

    fwd_s: tuple[float, ...]
    bwd_s: tuple[float, ...]
    """Seconds per stage, with the micro-batch's share of the optimizer step."""
    p2p_s: float

    @property
    def slowest_s(self) -> float:
        """Forward and backward on the slowest stage."""
        return max(f + b for f, b in zip(self.fwd_s, self.bwd_s, strict=True))


class StructurePrices:
    """Prices decisions; what it prices for an hTask on a kind of stage it prices once.

    Args:
        costs: Costs of operators, for the whole backbone.
        model: Backbone.
        cluster: Where the meshes stand.
        pefts: Methods of all tasks; layers to which they attach the same have one price.
        works: Micro-batches of an hTask.
    """

    def __init__(
        self,
        costs: CostModel,
        model: ModelSpec,
        cluster: ClusterSpec,
        pefts: Specs,
        works: Callable[[HTaskChoice], HTaskWorks],
    ) -> None:
        self._costs = costs
        self._adapted = lru_cache(maxsize=None)(costs.with_adapters)
        self._model = model
        self._cluster = cluster
        self._pefts = pefts
        self._works = works
        self._slowest = lru_cache(maxsize=None)(self._find_slowest)
        self._replicas = lru_cache(maxsize=None)(self._find_replicas)
        self._times = lru_cache(maxsize=None)(self.price)
        self._actions = lru_cache(maxsize=4096)(self._action_prices)  # stages of all meshes share their parts
        self._launch_graph = lru_cache(maxsize=1024)(self._build_graph)
        self._clock_s = lru_cache(maxsize=None)(self._orchestrate)
        self._step_s = lru_cache(maxsize=None)(self._price_step)
        self._streams: StreamSeconds = {}
        self._task_step_s = lru_cache(maxsize=None)(self._price_task_step)

    def price(self, htask: HTaskChoice, mesh: Mesh, orchestration: Orchestration = SEQUENTIAL) -> HTaskTimes:
        """Ask the costs what one micro-batch takes.

        Raises:
            SpecError: It takes no time, or less, or is no number: a search would never end.
        """
        kinds = self.stage_kinds(mesh)
        seconds = {kind: self._action_s(htask, kind, mesh, orchestration) for kind in dict.fromkeys(kinds)}
        fwd, bwd = zip(*(seconds[kind] for kind in kinds), strict=True)
        routes = mesh.on(self._cluster).message_routes()
        p2p = p2p_seconds(self._costs, self._model, htask.shape.tokens, routes)
        for name, row, least_s in (
            ("forwards", fwd, _SHORTEST_S),
            ("backwards", bwd, _SHORTEST_S),
            ("transfers", (p2p,), 0.0),
        ):
            if not all(least_s <= seconds <= MOST_SECONDS for seconds in row):  # false for nan, too
                field = f"costs {self._costs.ref.profile_id}: {name} of {' + '.join(htask.task_ids)}"
                raise SpecError(field, list(row), f"seconds above 0, and at most {MOST_SECONDS:.0f}")
        return HTaskTimes(fwd, bwd, p2p)

    def htask_times(
        self, htask: HTaskChoice, mesh: Mesh, orchestration: Orchestration = SEQUENTIAL
    ) -> HTaskTimes:
        """:meth:`price`, remembered; where nothing overlaps, all modes are one."""
        if not overlaps(mesh, orchestration) and orchestration.adapters == SEQUENTIAL.adapters:
            orchestration = SEQUENTIAL
        return self._times(htask, mesh, orchestration)

    def stage_kinds(self, mesh: Mesh) -> list[StageKind]:
        """Kind of every stage of a mesh."""
        return stage_kinds(self._model, self._pefts, mesh.layers_per_stage, mesh.on(self._cluster))

    def work(
        self, htask: HTaskChoice, kind: StageKind, tp: int, adapters: Launching = "grouped"
    ) -> MicrobatchWork:
        """An average micro-batch of the replica that is slowest on such a stage."""
        return self._works(htask).of(self._slowest(htask, kind[:3], tp, adapters))

    def layer_seconds(self, htask: HTaskChoice, mesh: Mesh) -> float:
        """Forward and backward of one more layer in a stage in the middle, per micro-batch.

        Where layers differ, that of a mean one.
        """
        runs = self._all_layers
        if len(runs) == 1:
            one_s, two_s = (self._alone_s(htask, mesh, ((runs[0][0], n),)) for n in (1, 2))
            return two_s - one_s
        few: LayerRuns = ((runs[0][0], 1),)
        added_s = self._alone_s(htask, mesh, (*few, *runs)) - self._alone_s(htask, mesh, few)
        return added_s / self._model.layers

    def end_seconds(self, htask: HTaskChoice, mesh: Mesh) -> tuple[float, float]:
        """What the first and the last stage have beside what one in the middle has, per micro-batch."""
        ends: list[LayerRuns] = [((self._all_layers[end][0], 1),) for end in (0, -1)]
        first_s, last_s = (
            self._alone_s(htask, mesh, layer, first=first, last=not first) - self._alone_s(htask, mesh, layer)
            for layer, first in zip(ends, (True, False), strict=True)
        )
        return first_s, last_s

    @property
    def _all_layers(self) -> LayerRuns:
        return stage_layers(self._model, self._pefts, 0, self._model.layers)

    def _alone_s(
        self, htask: HTaskChoice, mesh: Mesh, layers: LayerRuns, *, first: bool = False, last: bool = False
    ) -> float:
        """Forward and backward of a micro-batch on a stage of these layers."""
        replicas = mesh.on(self._cluster).replica_routes(0)
        return sum(self._action_s(htask, StageKind(layers, first, last, replicas), mesh, SEQUENTIAL))

    def stage_times(self, structure: PlanStructure) -> StageTimes:
        """Durations that the structure's schedule is played with."""
        mesh, orchestration = structure.mesh, structure.orchestration
        prices = [self.htask_times(htask, mesh, orchestration) for htask in structure.htasks]
        stages = range(mesh.pp)
        return StageTimes(
            fwd_s=[[price.fwd_s[stage] for price in prices] for stage in stages],
            bwd_s=[[price.bwd_s[stage] for price in prices] for stage in stages],
            p2p_s=[price.p2p_s for price in prices],
            clocks=self._clock_times(structure) if orchestration.shares_clocks else None,
        )

    def launches(self, structure: PlanStructure) -> tuple[ClockLaunches, ...]:
        """Launch orders of the structure's clocks, as far as they overlap."""
        mesh, orchestration = structure.mesh, structure.orchestration
        if not overlaps(mesh, orchestration):
            return ()
        rotation = iteration_clocks(
            structure.buckets, structure.microbatches, co_scheduled=orchestration.shares_clocks
        )
        found: list[ClockLaunches] = []
        for members in dict.fromkeys(htasks for _, htasks in rotation):
            chosen = tuple(structure.htasks[h] for h in members)
            for direction, phase in DIRECTIONS:
                order_of = {
                    kind: self._schedule(chosen, kind, phase, mesh.tp, orchestration).order
                    for kind in dict.fromkeys(self.stage_kinds(mesh))
                }
                orders = [order_of[kind] for kind in self.stage_kinds(mesh)]
                found.append(clock_launches(direction, members, orders))
        return tuple(found)

    def _clock_times(self, structure: PlanStructure) -> ClockTimes:
        rotation = iteration_clocks(structure.buckets, structure.microbatches, co_scheduled=True)
        seconds: dict[ClockKind, Sequence[float]] = {}
        for members in dict.fromkeys(htasks for _, htasks in rotation if len(htasks) > 1):
            chosen = tuple(structure.htasks[h] for h in members)
            mesh, orchestration = structure.mesh, structure.orchestration
            per_kind = {
                kind: self._shared_s(chosen, kind, mesh, orchestration)
                for kind in dict.fromkeys(self.stage_kinds(mesh))
            }
            fwd, bwd = zip(*(per_kind[kind] for kind in self.stage_kinds(mesh)), strict=True)
            seconds["F", members], seconds["B", members] = fwd, bwd
        return ClockTimes(buckets=structure.buckets, microbatches=structure.microbatches, seconds=seconds)

    def _shared_s(
        self, htasks: tuple[HTaskChoice, ...], kind: StageKind, mesh: Mesh, orchestration: Orchestration
    ) -> tuple[float, float]:
        """Forward and backward of a clock on a kind of stage, with the backward's share of the steps."""
        if mesh.tp == 1:  # nothing inside a stage communicates, so nothing overlaps
            alone = [self._action_s(htask, kind, mesh, orchestration) for htask in htasks]
            return sum(fwd for fwd, _ in alone), sum(bwd for _, bwd in alone)
        fwd, bwd = (self._clock_s(htasks, kind, phase, mesh.tp, orchestration) for phase in PHASES)
        return fwd, bwd + sum(self._step_share_s(htask, kind, mesh) for htask in htasks)

    def _action_s(
        self, htask: HTaskChoice, kind: StageKind, mesh: Mesh, orchestration: Orchestration
    ) -> tuple[float, float]:
        fwd = self._serial_s(htask, kind, "fwd", mesh.tp, orchestration)  # a forward alone is a chain
        if overlaps(mesh, orchestration):
            bwd = self._clock_s((htask,), kind, "bwd", mesh.tp, orchestration)
        else:
            bwd = self._serial_s(htask, kind, "bwd", mesh.tp, orchestration)
        return fwd, bwd + self._step_share_s(htask, kind, mesh)

    def _serial_s(
        self, htask: HTaskChoice, kind: StageKind, phase: Phase, tp: int, orchestration: Orchestration
    ) -> float:
        choice = self._slowest(htask, kind[:3], tp, orchestration.adapters)
        prices = self._actions(htask, choice, phase, tp, orchestration.adapters)
        return prices.seconds(kind.layers, first=kind.first, last=kind.last)

    def _find_slowest(
        self, htask: HTaskChoice, stage: tuple[int, bool, bool], tp: int, adapters: Launching
    ) -> Choice:
        layers, first, last = stage
        return self._replicas(htask, tp, adapters).on_stage(layers, first=first, last=last)

    def _find_replicas(self, htask: HTaskChoice, tp: int, adapters: Launching) -> SlowestReplicas:
        costs, works = self._adapted(adapters), self._works(htask)
        return SlowestReplicas(works, costs, self._model, tp=tp, adapters=adapters, streams=self._streams)

    def _action_prices(
        self, htask: HTaskChoice, choice: Choice, phase: Phase, tp: int, adapters: Launching
    ) -> ActionPrices:
        costs, work = self._adapted(adapters), self._works(htask).of(choice)
        return ActionPrices(costs, self._model, work, phase, tp=tp, adapters=adapters, streams=self._streams)

    def _orchestrate(
        self,
        htasks: tuple[HTaskChoice, ...],
        kind: StageKind,
        phase: Phase,
        tp: int,
        orchestration: Orchestration,
    ) -> float:
        return self._schedule(htasks, kind, phase, tp, orchestration).seconds

    def _schedule(
        self,
        htasks: tuple[HTaskChoice, ...],
        kind: StageKind,
        phase: Phase,
        tp: int,
        orchestration: Orchestration,
    ) -> ClockSchedule:
        graphs = [self._launch_graph(htask, kind, phase, tp, orchestration.adapters) for htask in htasks]
        return schedule_clock(graphs, orchestration.mode, orchestration.contention)

    def _build_graph(
        self,
        htask: HTaskChoice,
        kind: StageKind,
        phase: Phase,
        tp: int,
        adapters: Launching,
    ) -> LaunchGraph:
        graph = stage_graph(
            self._model,
            kind.layers,
            first=kind.first,
            last=kind.last,
            work=self.work(htask, kind, tp, adapters),
            phase=phase,
            tp=tp,
            adapters=adapters,
        )
        return launch_graph(time_graph(graph, self._adapted(adapters), phase), adapters)

    def _step_share_s(self, htask: HTaskChoice, kind: StageKind, mesh: Mesh) -> float:
        return self._step_s(htask, kind, mesh.tp) / htask.shape.microbatches

    def _price_step(self, htask: HTaskChoice, kind: StageKind, tp: int) -> float:
        return sum(self.step_seconds(peft, kind, tp) for peft in self._works(htask).pefts)

    def step_seconds(self, peft: PeftSpec, kind: StageKind, tp: int) -> float:
        """Optimizer step of a task with this method on a kind of stage."""
        return self._task_step_s(peft, kind.layers, kind.first, kind.replicas, tp)

    def _price_task_step(
        self, peft: PeftSpec, layers: LayerRuns, first: bool, replicas: tuple[Route, ...], tp: int
    ) -> float:
        return step_seconds(self._costs, self._model, layers, peft, tp=tp, replicas=replicas, first=first)


def overlaps(mesh: Mesh, orchestration: Orchestration) -> bool:
    """Whether stages may compute while they communicate."""
    return mesh.tp > 1 and orchestration.mode != "sequential"


def stage_kinds(
    model: ModelSpec, pefts: Specs, layers_per_stage: Sequence[int], placement: Placement
) -> list[StageKind]:
    """Kind of every stage; most stages of a long pipeline are alike."""
    last = len(layers_per_stage) - 1
    return [
        StageKind(layers, stage == 0, stage == last, placement.replica_routes(stage))
        for stage, layers in enumerate(stages_layers(model, pefts, layers_per_stage))
    ]
