"""How long does the full search take, and how does that grow with the number of tasks?

Plans seeded random LoRA tasks (:func:`experiments.workloads.random_workload`) for Llama-2-7B on the 16 A40 of
testbed-b: all meshes, layers per stage, fusion, alignment, grouping, template and orchestration, with the
shipped coefficients as costs. Columns:

load    lengths are drawn and the tasks checked, once per problem
rank    all groups are priced by estimate on all meshes, and cut into partitions
play    partitions are priced exactly and their schedules played
search  both: what the bars are about (64 tasks in 2 s, 512 tasks in 20 s)
cpu     processor time of the search, which other processes on the machine do not lengthen
above   the winner's iteration over its lower bound, in percent

Adapters of 4,096 tasks exceed 48 GB per rank, so from 2,048 tasks on the memory is raised to 160 GB. Each
number is the median of some runs in fresh problems; one process, one thread.

    python -m benchmarks.planning [--tasks 8,64,512] [--runs 3] [--cluster testbed-b] [--out growth.png]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.helpers.machine import machine_line
from experiments.workloads import random_workload
from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.options import FREE
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.candidates import propose
from muxtune.planning.search.search import search_structures
from muxtune.support.files import write_atomically
from muxtune.support.tables import format_table

TASKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RAISED_FROM = 2048
RAISED_BYTES = 160 * 10**9
BARS_S = {64: 2.0, 512: 20.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Times and counts of one search."""

    load_s: float
    rank_s: float
    search_s: float
    cpu_s: float
    partitions: int
    looked_at: int
    above: float
    """Iteration over its bound, less one."""
    winner: str


def measure(tasks: int, cluster: ClusterSpec, seed: int) -> Run:
    """Plan one workload."""
    if tasks >= RAISED_FROM:
        device = cluster.device.model_copy(update={"memory_bytes": RAISED_BYTES})
        cluster = cluster.model_copy(update={"device": device})
    model = load_model_spec("llama2-7b")
    workload = random_workload(seed, tasks=tasks)
    costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    start_s = time.perf_counter()
    problem = PlanningProblem(workload, model, cluster, costs)
    load_s = time.perf_counter() - start_s

    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    record = search_structures(problem)
    search_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s

    # Again by itself, on costs that remember nothing.
    fresh = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    again = PlanningProblem(workload, model, cluster, fresh)
    start_s = time.perf_counter()
    propose(again, FREE)
    rank_s = time.perf_counter() - start_s

    best = record.outcomes[0]
    mesh = record.structures[0].mesh
    return Run(
        load_s=load_s,
        rank_s=rank_s,
        search_s=search_s,
        cpu_s=cpu_s,
        partitions=len(record.proposals),
        looked_at=len(record.outcomes),
        above=best.value / best.bound_s - 1,
        winner=f"{mesh}, {len(record.structures[0].htasks)} hTasks",
    )


def planning_table(medians: dict[int, Run]) -> str:
    """A row per number of tasks."""
    header = [
        "tasks",
        "load s",
        "rank s",
        "play s",
        "search s",
        "cpu s",
        "bar s",
        "partitions",
        "played",
        "above %",
    ]
    rows = [
        [
            str(tasks),
            f"{run.load_s:.2f}",
            f"{run.rank_s:.2f}",
            f"{max(run.search_s - run.rank_s, 0):.2f}",
            f"{run.search_s:.2f}",
            f"{run.cpu_s:.2f}",
            f"{BARS_S[tasks]:g}" if tasks in BARS_S else "",
            str(run.partitions),
            str(run.looked_at),
            f"{100 * run.above:.1f}",
            run.winner,
        ]
        for tasks, run in medians.items()
    ]
    return format_table([*header, "winner"], rows)


def draw_growth(medians: dict[int, Run], out: Path) -> None:
    """Seconds over tasks, both logarithmic."""
    import matplotlib as mpl  # noqa: PLC0415  # only for the picture

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    tasks = list(medians)
    for name, style in (("search_s", "o-"), ("cpu_s", "v-"), ("rank_s", "s--"), ("load_s", "^:")):
        seconds = [getattr(medians[n], name) for n in tasks]
        axes.plot(tasks, seconds, style, label=name.removesuffix("_s"))
    axes.plot(list(BARS_S), list(BARS_S.values()), "kx", label="bar")
    axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="seconds", title="Full search, 16 GPUs")
    axes.set_xticks(tasks, [str(n) for n in tasks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    kind = out.suffix.removeprefix(".")
    write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=150, format=kind))
    plt.close(figure)


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose search took the median."""
    middle = statistics.median_low(run.search_s for run in runs)
    return next(run for run in runs if run.search_s == middle)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", default=",".join(map(str, TASKS)), help="numbers of tasks")
    parser.add_argument("--runs", type=int, default=3, help="per number; 1 from 1024 tasks on")
    parser.add_argument("--cluster", default="testbed-b")
    parser.add_argument("--out", type=Path, default=None, help="picture of the growth")
    arguments = parser.parse_args()
    cluster = load_cluster(arguments.cluster)
    print(machine_line(), flush=True)
    medians: dict[int, Run] = {}
    for tasks in map(int, arguments.tasks.split(",")):
        runs = 1 if tasks >= 1024 else arguments.runs
        medians[tasks] = median_run([measure(tasks, cluster, seed) for seed in range(1, runs + 1)])
        print(
            f"{tasks} tasks: {medians[tasks].search_s:.2f} s, {medians[tasks].cpu_s:.2f} s of processor",
            flush=True,
        )
    print(f"\n{planning_table(medians)}")
    if arguments.out is not None:
        draw_growth(medians, arguments.out)
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
