"""What share of an iteration does it cost to know that every optimizer step is sound before it counts?

Eight mixed tasks that do not clip, so that nothing of it would be needed otherwise, on llama-tiny, as four
hTasks of two tasks. Counted on every rank, in steady iterations: gradient norms, their sum over shards, and
telling, hearing and reading the verdict of all stages; waits for others included. What is planned is priced
for A40s, which decides nothing here, and played by this machine's processors. Bar: 1 %.

    python -m benchmarks.verdict [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import runtime.launch.local
from benchmarks.helpers.machine import machine_line
from experiments.workloads import mixed_workload
from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.schedule import Template
from muxtune.support.tables import format_table, show_seconds
from runtime import RunOptions, load_report, run_plan
from runtime.engine.job import RunJob
from sim import search_plan

BAR = 0.01
MODEL = "llama-tiny"
TEMPLATES: tuple[Template, ...] = ("flush", "continuous")
PARTITION = "sst2-0+openbookqa-1,rte-2+sst2-3,openbookqa-4+rte-5,sst2-6+openbookqa-7"
MESHES = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2))
"""tp, pp, dp."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps: int = parser.parse_args().steps
    rows = []
    for tp, pp, dp in MESHES:
        for template in TEMPLATES:
            iteration_s, verdict_s = _measure(_plan(steps, (tp, pp, dp), template))
            share = verdict_s / iteration_s
            name = f"tp {tp}, pp {pp}, dp {dp}, {template}"
            rows.append([name, show_seconds(iteration_s), show_seconds(verdict_s), f"{share:.2%}"])
            rows[-1].append("ok" if share <= BAR else "above the bar")
    print(machine_line())
    print(format_table(["mesh", "iteration", "verdict, slowest rank", "share", f"bar {BAR:.0%}"], rows))


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


def _measure(plan: Plan) -> tuple[float, float]:
    """Median seconds of an iteration, and of the verdicts in it on the rank that has most of them."""
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        run_plan(plan, run_dir, RunOptions(device="cpu"))
        report = load_report(run_dir / "run.json")
        ranks = [json.loads(path.read_text()) for path in run_dir.glob("verdict-*.json")]
    assert len(ranks) == plan.parallelism.ranks
    return report.median_iteration_s, max(
        median(seconds[str(step)] for step in report.steady_steps) for seconds in ranks
    )


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

    seconds: dict[int, float] = {}
    find, finish = Stepper._verdict, RankRun._save_results
    parts = {name: getattr(StepVerdict, name) for name in ("tell", "pronounce")}

    def timed_find(self: Stepper, *arguments: object) -> StepVerdict:
        begin = perf_counter()
        verdict = find(self, *arguments)  # type: ignore[arg-type]
        seconds[verdict._step] = seconds.get(verdict._step, 0.0) + perf_counter() - begin
        return verdict

    def timed(name: str) -> Callable[[StepVerdict], None]:
        def call(self: StepVerdict) -> None:
            begin = perf_counter()
            parts[name](self)
            seconds[self._step] += perf_counter() - begin

        return call

    def save(self: RankRun) -> None:
        path = self._job.out_dir / f"verdict-{self._ready.rank}.json"
        path.write_text(json.dumps(seconds))
        finish(self)

    Stepper._verdict = timed_find  # type: ignore[method-assign]
    for name in parts:
        setattr(StepVerdict, name, timed(name))
    RankRun._save_results = save  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    runtime.launch.local._start = _start
    main()
