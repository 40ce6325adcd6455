"""A stage's runner on one shard of a plan whose clocks take turns; what the other would add is left out."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

import runtime.engine.recorder
import runtime.engine.stepper
from muxtune.cluster import load_cluster
from muxtune.model import PRESETS
from muxtune.plan import Plan, extend_schedule
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.schedule import COMPUTE, Action, ActionSpan
from muxtune.tasks import Workload
from runtime.backbone.stage import Stage
from runtime.backbone.weights import open_weights
from runtime.data.feed import Feed, load_plan_data
from runtime.device.stopwatch import HostStopwatch
from runtime.distributed.mesh import RankMesh
from runtime.distributed.sharding import Shard
from runtime.distributed.teams import StageTeam
from runtime.engine.meter import ActionMeter
from runtime.engine.recorder import Recorder
from runtime.engine.runner import StageRunner
from runtime.engine.stepper import Stepper
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from runtime.tasks.losses import LossLedger, step_losses
from runtime.tasks.tenant import Tenant
from tests.helpers import make_task, write_examples
from tests.muxtune.planning.problems import FakeCosts

MODEL = PRESETS["llama-tiny"].model_copy(update={"layers": 2})
STEPS = 3


class Ticks(HostStopwatch):
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        super().__init__()
        self._read = 0

    def now(self) -> int:
        self._read += 1
        return self._read * 10**9


class Alone:
    """A team of which one rank is there."""

    def launch(self, tensor: Tensor, op: object) -> Callable[[], None]:
        return lambda: None


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Two hTasks that share every clock, on two shards of one stage."""
    folder = tmp_path_factory.mktemp("data")
    tasks = tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=seed), steps=STEPS)
        for seed, name in enumerate("ab")
    )
    options = PlanOptions(partition="a,b", tp=2, pp=1, dp=1, orchestration="round-robin")
    plan, *_ = plan_workload(
        Workload(tasks=tasks), MODEL, load_cluster("cpu-2"), FakeCosts(), options=options
    )
    return plan


@dataclass(frozen=True)
class Rank:
    """A rank's runner, and what it tells of its work."""

    runner: StageRunner
    recorder: Recorder
    meter: ActionMeter


def build_rank(plan: Plan, folder: Path, rank: int = 0) -> Rank:
    mesh = RankMesh(plan.parallelism, rank)
    mesh.stopwatch = Ticks()
    mesh.team = StageTeam(Alone(), mesh.stopwatch)
    mesh.shard = Shard(rank, 2, mesh.team)
    weights = open_weights(MODEL)
    stage = Stage(MODEL, range(MODEL.layers), first=True, last=True, weights=weights, shard=mesh.shard)
    tenants = {}
    for task in plan.tasks:
        initial_adapter(MODEL, task, folder / task.id)
        stage.add_task(task, load_adapter(folder / task.id))
        tenants[task.id] = Tenant(task, stage.task_parameters(task.id), stage.task_portions(task.id))
    recorder = Recorder(mesh, plan.microbatches)
    meter = ActionMeter(plan.microbatches)
    feed = Feed(plan, load_plan_data(plan))
    ledger = LossLedger(feed, plan.microbatches)
    htask_tenants = [[tenants[task_id] for task_id in htask.task_ids] for htask in plan.htasks]
    stepper = Stepper(
        mesh,
        htask_tenants,
        ledger,
        recorder,
        faults=feed.faults,
        on_fault=lambda task_id, step, what: None,
        on_step=lambda htask, step: None,
    )
    runner = StageRunner(
        plan,
        mesh,
        extend_schedule(plan, STEPS)[0],
        feed=feed,
        stages={0: stage},
        ledger=ledger,
        stepper=stepper,
        recorder=recorder,
        meter=meter,
    )
    return Rank(runner, recorder, meter)


@pytest.fixture(scope="module")
def played(plan, tmp_path_factory) -> Rank:
    """One that has played the plan."""
    played = build_rank(plan, tmp_path_factory.mktemp("run"))
    played.runner.run(0)
    return played


def parts(rank: Rank) -> dict[Action, list[ActionSpan]]:
    """Spans in which each action computes."""
    found: dict[Action, list[ActionSpan]] = defaultdict(list)
    for span in rank.recorder.spans:
        if span.stream == COMPUTE:
            found[span.action].append(span)
    return found


def test_the_actions_of_a_clock_take_turns(played):
    assert len(parts(played)[Action("F", 0, 2)]) > 6  # the feed, a turn for each sum and a last one, the end
    assert len(parts(played)[Action("B", 1, 3)]) > 5


def test_an_action_is_counted_as_if_it_had_a_clock_of_its_own(plan, played, tmp_path):
    alone = build_rank(plan, tmp_path)
    alone.runner._overlap = None
    alone.runner.run(0)
    found, expected = played.meter.seen, alone.meter.seen
    assert min(*expected.forward_workspace.values(), *expected.backward_workspace.values()) > 0
    assert found.forward_workspace == expected.forward_workspace
    assert found.backward_workspace == expected.backward_workspace
    assert found.kept == expected.kept


def test_from_some_number_on_the_turns_of_an_action_are_one_span(plan, played, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.engine.recorder, "TRACED_SPANS", 20)
    short = build_rank(plan, tmp_path)
    short.runner.run(0)
    found, expected = parts(short), parts(played)
    assert found.keys() == expected.keys()
    for action, whole in expected.items():
        assert sum(s.duration_s for s in found[action]) == pytest.approx(sum(s.duration_s for s in whole))
        assert min(s.start_s for s in found[action]) == min(s.start_s for s in whole)
        assert max(s.end_s for s in found[action]) == max(s.end_s for s in whole)
        if action.number > 2:
            assert len(found[action]) <= 4  # the feed, the first turn, the others, the end


def test_waits_for_sums_are_added_up_per_step(plan, played):
    m = plan.microbatches
    assert played.recorder.exposed_s.keys() == {
        Action(kind, h, step * m[h]) for kind in ("F", "B") for h in (0, 1) for step in range(STEPS)
    }
    waits: dict[tuple[str, int, int], float] = defaultdict(float)
    for span in played.recorder.operators:
        if span.label == "wait":
            waits[span.action.kind, span.action.htask, span.action.number // m[span.action.htask]] += (
                span.end_s - span.start_s
            )
    assert waits == {
        (a.kind, a.htask, a.number // m[a.htask]): s for a, s in played.recorder.exposed_s.items()
    }


def test_only_the_rank_that_speaks_for_its_stage_records_what_it_did(plan, tmp_path):
    rank = build_rank(plan, tmp_path, rank=1)
    rank.runner.run(0)
    other = rank.recorder
    assert (other.spans, other.operators, dict(other.exposed_s)) == ([], [], {})
    assert {task_id: len(losses) for task_id, losses in other.losses.items()} == {"a": STEPS, "b": STEPS}


def test_the_threads_of_the_turns_end_with_the_run(plan, tmp_path):
    runner = build_rank(plan, tmp_path).runner
    before = set(threading.enumerate())
    runner.run(0)
    assert set(threading.enumerate()) <= before


def test_the_host_reads_losses_after_it_has_launched_the_whole_step(plan, tmp_path, monkeypatch):
    """On a GPU it waits there, and only there."""
    events = []
    losses, step = step_losses, Tenant.step
    monkeypatch.setattr(
        runtime.engine.stepper, "step_losses", lambda *a, **k: [events.append("losses"), losses(*a, **k)][1]
    )
    monkeypatch.setattr(Tenant, "step", lambda *a: [events.append("step"), step(*a)][1])
    build_rank(plan, tmp_path).runner.run(0)
    assert events == ["step", "losses"] * 2 * STEPS


def test_what_no_task_is_to_blame_for_is_raised(plan, tmp_path, monkeypatch):
    """A forward that cannot be computed without any task either is the rank's own failure."""
    runner = build_rank(plan, tmp_path).runner

    def fail(self, batch, hidden):
        raise RuntimeError("no memory for anybody")

    monkeypatch.setattr(Stage, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory for anybody"):
        runner.run(0)
    assert not any(runner._feed.faults.met(["a", "b"], 0))
