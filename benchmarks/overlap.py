"""What does the plan's launch order gain where two ranks share a stage, and was that predicted?

Eight mixed tasks on llama-tiny, as four hTasks of two tasks, on two one-thread ranks that share the only
stage (tp=2, pp=1). The same hTasks are executed under every orchestration, in rounds one after the other, so
that all see the same machine:

    sequential   every sum over the ranks is waited for at once
    intra        gradients of adapters are computed beside sums of the same hTask
    round-robin  hTasks of a bucket take turns at every sum
    interleaved  the order of list scheduling

Exposed communication is what a rank waited inside of forwards and backwards for sums, in one iteration, read
from the trace; predicted, what the simulator's trace says of the same plan. Ratios are to sequential.

    python -m benchmarks.overlap [--rounds 5] [--steps 8] [--profile P.parquet]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.helpers.machine import machine_costs, machine_line
from experiments.workloads import mixed_workload
from muxtune.cluster import load_cluster
from muxtune.costs import CostModel
from muxtune.model import load_model_spec
from muxtune.orchestration import MODES
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.schedule import OperatorSpan
from muxtune.support.tables import format_table, show_seconds
from runtime import run_plan
from sim import search_plan, simulate_operators

PARTITION = "sst2-0+openbookqa-1,rte-2+sst2-3,openbookqa-4+rte-5,sst2-6+openbookqa-7"


@dataclass(frozen=True, slots=True)
class Execution:
    """One real run."""

    iteration_s: float
    exposed_s: float
    """Exposed communication per iteration."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    arguments = parser.parse_args()

    model, cluster = load_model_spec("llama-tiny"), load_cluster("cpu-2")
    costs = machine_costs(model, arguments.profile)
    workload = mixed_workload(arguments.steps)
    plans = {
        mode: search_plan(
            workload,
            model,
            cluster,
            costs,
            policy="muxtune",
            options=PlanOptions(
                partition=PARTITION, tp=2, pp=1, template="flush", alignment="pack", orchestration=mode
            ),
        )
        for mode in MODES
    }
    executed: dict[str, list[Execution]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for mode, plan in plans.items():
            executed[mode].append(execute(plan))

    print(f"machine: {machine_line()}")
    contention = "not measured" if costs.contention is None else f"{costs.contention:.2f}"
    print(
        f"8 mixed tasks in 4 hTasks, llama-tiny, tp=2, pp=1, {arguments.rounds} rounds of {arguments.steps} "
        f"steps; contention {contention}"
    )
    print(format_table(("mode", *_COLUMNS), list(table(plans, executed, costs))))


_COLUMNS = (
    "buckets",
    "predicted",
    "measured",
    "spread",
    "exposed, predicted",
    "exposed, measured",
    "ratio, predicted",
    "ratio, measured",
    "error",
)


def execute(plan: Plan) -> Execution:
    """Run a plan for real."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_plan(plan, Path(folder) / "run")
        waited_s = traced_waits_s(Path(folder) / "run" / "trace.json", plan, set(report.steady_steps))
    return Execution(report.median_iteration_s, waited_s / len(report.steady_steps))


def traced_waits_s(path: Path, plan: Plan, steps: set[int]) -> float:
    """Seconds that the forwards and backwards of these steps waited for sums, by the trace of a run."""
    waited_us = 0.0
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") == "operator" and event["name"] == "wait":
            htask, number = event["args"]["action"][1:].split(".")
            if int(number) // plan.microbatches[int(htask)] in steps:
                waited_us += event["dur"]
    return waited_us / 1e6


def simulated_exposed_s(plan: Plan, costs: CostModel) -> float:
    """Seconds of one iteration in which a simulated stage communicates and does not compute."""
    report = simulate_operators(plan, costs, iterations=1)
    return exposed_s(report.operators)


def exposed_s(operators: Sequence[OperatorSpan]) -> float:
    """Time in which the communication stream of stage 0 is busy and its compute stream is not."""
    changes = sorted(
        (time_s, change, span.stream)
        for span in operators
        for time_s, change in ((span.start_s, 1), (span.end_s, -1))
    )
    running: dict[str, int] = defaultdict(int)
    total_s = last_s = 0.0
    for time_s, change, stream in changes:
        if running["communication"] and not running["compute"]:
            total_s += time_s - last_s
        running[stream] += change
        last_s = time_s
    return total_s


def table(
    plans: dict[str, Plan], executed: dict[str, list[Execution]], costs: CostModel
) -> Iterator[tuple[str, ...]]:
    """A row per mode."""
    base = plans["sequential"].predicted.iteration_s
    # Ratios within a round: what the machine does to one run it does to the next.
    base_runs = executed["sequential"]
    for mode, runs in executed.items():
        plan, times = plans[mode], sorted(run.iteration_s for run in runs)
        measured = median(
            run.iteration_s / other.iteration_s for run, other in zip(runs, base_runs, strict=True)
        )
        predicted = plan.predicted.iteration_s / base
        yield (
            mode,
            str(len(plan.buckets)),
            show_seconds(plan.predicted.iteration_s),
            show_seconds(median(times)),
            f"{show_seconds(times[0])} to {show_seconds(times[-1])}",
            show_seconds(simulated_exposed_s(plan, costs)),
            show_seconds(median(run.exposed_s for run in runs)),
            f"{predicted:.3f}",
            f"{measured:.3f}",
            f"{predicted / measured - 1:+.1%}",
        )


if __name__ == "__main__":
    main()
