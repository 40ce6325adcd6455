"""How many operators per second the simulator executes, each of them an event of SimPy.

    python -m benchmarks.simulator [--runs 7] [--iterations 6]

Eight tasks on LLaMA2-7B, priced by the A40's coefficients: on four stages, and on four stages of two ranks
each, where the hTasks of a bucket share clocks. The simulation is timed, with the making of spans where they
are recorded; programs are built before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.helpers.machine import machine_line
from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import PRESETS
from muxtune.plan import Orchestration, OrchestrationDecision, Plan
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import StageTimes, build_schedule
from muxtune.tasks import Workload, workload_from
from sim.engine import play_clocks
from sim.operators import OperatorWork
from sim.plan_programs import PlanPrograms

MODEL = PRESETS["llama2-7b"]
STAGES = 4
TASKS = (("sst2", 64), ("openbookqa", 128), ("rte", 256), ("sst2", 128)) * 2
"""Length distribution and longest sequence."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per plan, with spans recorded or not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of which the median is printed")
    parser.add_argument("--iterations", type=int, default=6, help="of the plan, per run")
    options = parser.parse_args(arguments)
    print(machine_line())
    for name, tp, mode in (("tp 1, sequential", 1, "sequential"), ("tp 2, interleaved", 2, "interleaved")):
        cluster = load_cluster("testbed-b") if tp > 1 else load_cluster("testbed-a")
        costs = AnalyticCosts(cluster.device.name, MODEL, interconnect_of(cluster))
        orchestration = Orchestration.model_validate({"mode": mode, "contention": 0.2})
        plan = _plan(cluster, costs, tp, options.iterations, orchestration)
        programs = PlanPrograms(plan, costs)
        times = programs.times()  # asks for every program
        for record in (False, True):
            runs = [_run(plan, programs, times, record=record) for _ in range(options.runs)]
            wall = [run.executed / run.wall_s for run in runs]
            processor = median(run.executed / run.processor_s for run in runs)
            spans = "with spans" if record else "without spans"
            print(
                f"{name}, pp {STAGES}, {spans}: {median(wall):,.0f} operator executions per second"
                f" (median of {options.runs}, {min(wall):,.0f} to {max(wall):,.0f}),"
                f" {processor:,.0f} per second of processor time; {runs[0].executed:,} per run"
            )


@dataclass(frozen=True, slots=True)
class _Run:
    executed: int
    wall_s: float
    processor_s: float
    """Less than the wall's where others use the core too."""


def _run(plan: Plan, programs: PlanPrograms, times: StageTimes, *, record: bool) -> _Run:
    contention = plan.orchestration.contention
    work = OperatorWork(programs, stages=STAGES, contention=contention, record=record)
    clocks = [times.cut(actions) for actions in plan.actions]
    wall_s, processor_s = time.perf_counter(), time.process_time()
    play_clocks(clocks, work, times.p2p_s)
    deque(work.log, maxlen=0)  # makes the spans
    return _Run(work.executed, time.perf_counter() - wall_s, time.process_time() - processor_s)


def _plan(
    cluster: ClusterSpec, costs: AnalyticCosts, tp: int, iterations: int, orchestration: Orchestration
) -> Plan:
    """An hTask per task, two in a bucket."""
    problem = PlanningProblem(_workload(), MODEL, cluster, costs)
    structure = PlanStructure(
        htasks=tuple(
            HTaskChoice(task_ids=(id_,), shape=problem.shape((id_,), "pack")) for id_ in problem.data
        ),
        buckets=tuple((first, first + 1) for first in range(0, len(TASKS), 2)),
        template="continuous",
        mesh=Mesh((MODEL.layers // STAGES,) * STAGES, tp),
    )
    actions = build_schedule(
        structure.buckets,
        structure.microbatches,
        pp=STAGES,
        template=structure.template,
        steps=[iterations] * len(TASKS),
        co_scheduled=orchestration.shares_clocks,
    )
    schedule = tuple(tuple((a.kind, a.htask, a.number) for a in stage) for stage in actions)
    base = assemble_plan(problem, structure, "benchmark")
    decided = OrchestrationDecision(mode=orchestration.mode)
    base = base.with_decisions(orchestration=decided)
    return base.with_derived(contention=orchestration.contention, schedule=schedule)


def _workload() -> Workload:
    tasks = [
        {
            "id": f"task-{number}",
            "peft": {"method": "lora", "r": 16, "alpha": 32, "targets": ["all-linear"]},
            "dataset": {"lengths": lengths},
            "global_batch_size": 32,
            "micro_batch_size": 8,
            "max_length": longest,
            "learning_rate": 1e-4,
            "steps": 100,
        }
        for number, (lengths, longest) in enumerate(TASKS)
    ]
    return workload_from({"tasks": tasks}, "benchmark", Path())


if __name__ == "__main__":
    main(sys.argv[1:])
