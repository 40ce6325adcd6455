"""What share of an iteration does it cost to know that every optimizer step is sound before it counts?

Eight mixed tasks that do not clip, so that nothing of it would be needed otherwise, on llama-tiny, as four
hTasks of two tasks. Counted on every rank, in steady iterations: gradient norms, their sum over shards, and
telling, hearing and reading the verdict of all stages.

Two shares, each of one iteration and of the rank where it is largest. The processor's: what the rank's thread
computes, over all that its process computes; other programs of the machine hardly change that. The wall
clock's: with what the rank waits for others meanwhile, which it may have waited for anyway, at its next
forward. Meshes are played in turns, so that a slow minute hits all of them, and the median of the rounds
counts. What is planned is priced for A40s, which decides nothing here. Bar: 1 % of the processor's time.

    python -m benchmarks.verdict [--steps 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import NamedTuple

from torch import Tensor

import runtime.launch.local
from benchmarks.helpers.machine import machine_line
from experiments.workloads import mixed_workload
from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.schedule import Action, Template
from muxtune.support.tables import format_table, show_seconds
from runtime import RunOptions, load_report, run_plan
from runtime.engine.job import RunJob
from runtime.tasks.tenant import Tenant
from sim import search_plan

BAR = 0.01
MODEL = "llama-tiny"
TEMPLATES: tuple[Template, ...] = ("flush", "continuous")
PARTITION = "sst2-0+openbookqa-1,rte-2+sst2-3,openbookqa-4+rte-5,sst2-6+openbookqa-7"
MESHES = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2))
"""tp, pp, dp."""


class Shares(NamedTuple):
    """Medians over steady iterations, of the rank where the verdict's share is largest."""

    iteration_s: float
    verdict_cpu_s: float
    cpu: float
    """Verdict over iteration, in processor time."""
    wall: float
    """Verdict over iteration, in wall clock time, with waits."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    plans = {
        f"tp {mesh[0]}, pp {mesh[1]}, dp {mesh[2]}, {template}": _plan(arguments.steps, mesh, template)
        for mesh in MESHES
        for template in TEMPLATES
    }
    found: dict[str, list[Shares]] = {name: [] for name in plans}
    for _ in range(arguments.rounds):
        for name, plan in plans.items():
            found[name].append(_measure(plan))
    rows = []
    for name, rounds in found.items():
        iteration_s, verdict_cpu_s, cpu, wall = (median(each) for each in zip(*rounds, strict=True))
        low, high = min(each.cpu for each in rounds), max(each.cpu for each in rounds)
        shares = [f"{cpu:.2%}", f"{low:.2%} to {high:.2%}", f"{wall:.2%}"]
        is_low = "ok" if cpu <= BAR else "above the bar"
        rows.append([name, show_seconds(iteration_s), show_seconds(verdict_cpu_s), *shares, is_low])
    print(machine_line())
    header = ["mesh", "iteration", "verdict, processor", "share", "rounds", "with waits", f"bar {BAR:.0%}"]
    print(format_table(header, rows))


def _plan(steps: int, mesh: tuple[int, int, int], template: Template) -> Plan:
    workload = mixed_workload(steps)
    tasks = tuple(task.model_copy(update={"max_grad_norm": None}) for task in workload.tasks)
    tp, pp, dp = mesh
    model, cluster = load_model_spec(MODEL), load_cluster("testbed-a")
    return search_plan(
        workload.model_copy(update={"tasks": tasks}),
        model,
        cluster,
        AnalyticCosts(cluster.device.name, model, interconnect_of(cluster)),
        policy="muxtune",
        options=PlanOptions(partition=PARTITION, tp=tp, pp=pp, dp=dp, template=template, alignment="pack"),
    )


def _measure(plan: Plan) -> Shares:
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        run_plan(plan, run_dir, RunOptions(device="cpu"))
        report = load_report(run_dir / "run.json")
        ranks = [json.loads(path.read_text()) for path in run_dir.glob("verdict-*.json")]
    assert len(ranks) == plan.parallelism.ranks
    iteration_s = report.median_iteration_s
    shares = []
    for rank in ranks:
        steady = [rank[str(step)] for step in report.steady_steps]
        cpu_s = median(each["cpu_s"] for each in steady)
        wall_s = median(each["wall_s"] for each in steady)
        begins_s = [rank[str(step)]["process_s"] for step in sorted(map(int, rank))]
        # Steps of a continuous schedule overlap; from one to the next is an iteration all the same.
        process_s = median(after - before for before, after in pairwise(begins_s))
        shares.append(Shares(iteration_s, cpu_s, cpu_s / process_s, wall_s / iteration_s))
    return max(shares, key=lambda each: each.cpu)


def _start(job: RunJob, rank: int, meeting: Path, logs: Path) -> subprocess.Popen[bytes]:
    """Like the launcher's own, with a rank that counts."""
    command = [sys.executable, "-c", "from benchmarks.verdict import counting_rank; counting_rank()"]
    command += [job.model_dump_json(), str(rank), str(meeting)]
    with (logs / f"rank-{rank}.log").open("ab") as log:
        return runtime.launch.local._Rank(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0
        )


def counting_rank() -> None:
    """Be a rank, and leave the seconds per step in the run's folder."""
    from runtime.engine.rank import RankRun, main  # noqa: PLC0415  # only in a rank
    from runtime.engine.stepper import Stepper  # noqa: PLC0415
    from runtime.tasks.verdict import StepVerdict  # noqa: PLC0415

    seconds: dict[int, dict[str, float]] = {}
    steps: dict[int, int] = {}
    find, finish = Stepper._verdict, RankRun._save_results
    parts = {name: getattr(StepVerdict, name) for name in ("tell", "pronounce")}

    def count(step: int, begin: tuple[float, float]) -> None:
        fresh = {"cpu_s": 0.0, "wall_s": 0.0, "process_s": process_time()}
        counted = seconds.setdefault(step, fresh)
        counted["wall_s"] += perf_counter() - begin[0]
        counted["cpu_s"] += thread_time() - begin[1]

    def timed_find(
        self: Stepper, action: Action, active: Sequence[Tenant], faults: Tensor, nll: Tensor | None
    ) -> StepVerdict:
        begin = perf_counter(), thread_time()
        verdict = find(self, action, active, faults, nll)
        steps[id(verdict)] = action.number
        count(steps[id(verdict)], begin)
        return verdict

    def timed(name: str) -> Callable[..., object]:
        def call(self: StepVerdict, *arguments: object) -> object:
            begin = perf_counter(), thread_time()
            result = parts[name](self, *arguments)
            count(steps[id(self)], begin)
            return result

        return call

    def save(self: RankRun) -> None:
        path = self._job.out_dir / f"verdict-{self._ready.rank}.json"
        path.write_text(json.dumps(seconds))
        finish(self)

    Stepper._verdict = timed_find  # type: ignore[assignment,method-assign]
    for name in parts:
        setattr(StepVerdict, name, timed(name))
    RankRun._save_results = save  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    runtime.launch.local._start = _start
    main()
