"""What does each stage of the search buy, in plan quality and in planning time?

Plans seeded random LoRA tasks (:func:`experiments.workloads.random_workload`, 4 to 64 of them) for
Llama-2-7B on testbeds A, B and C, a third of them with less memory than the devices have, in fresh problems:
with all stages, and with each stage left out or weakened (:data:`STAGES`). Columns:

slower   iteration time without the stage over that with it, less one: median, p90 and the worst
worse    share of the instances in which the plan is slower by more than 0.1 %
time     processor time of the search without the stage over that with it: median
refused  instances for which nothing is found that fits the memory without the stage

With ``--out``, what was measured is kept, and a run that was stopped goes on where it was.

    python -m benchmarks.search_ablation [--instances 60] [--stages 'no paces,one bucket'] [--out ROWS.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from benchmarks.helpers.machine import machine_line
from experiments.workloads import random_workload
from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS, SearchSettings
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.search import search_structures
from muxtune.support.errors import SpecError
from muxtune.support.files import write_atomically
from muxtune.support.tables import format_table

TESTBEDS = ("testbed-a", "testbed-b", "testbed-c")
TASKS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
LESS_MEMORY = 0.45
"""Share of the device's memory that every third instance has."""
WORSE = 1e-3
"""Share of an iteration from which a plan counts as slower."""

STAGES: dict[str, SearchSettings] = {
    "no order by declared micro-batches": replace(DEFAULT_SETTINGS, orders=("tokens",)),
    "no order by tokens": replace(DEFAULT_SETTINGS, orders=("declared",)),
    "no paces": replace(DEFAULT_SETTINGS, paces=0),
    "no ranking of all partitions": replace(DEFAULT_SETTINGS, all_partitions_up_to=0),
    "no refinement": replace(DEFAULT_SETTINGS, refined_below=0),
    "no carry groups": replace(DEFAULT_SETTINGS, carries=(1,)),
    "carry groups of 2 only": replace(DEFAULT_SETTINGS, carries=(1, 2)),
    "no second alignment": replace(DEFAULT_SETTINGS, near=1e-9),
    "no flush where memory is short": replace(DEFAULT_SETTINGS, templates=("continuous",)),
    "no continuous": replace(DEFAULT_SETTINGS, templates=("flush",)),
    "one bucket": replace(DEFAULT_SETTINGS, most_groupings=1),
    "two numbers of buckets": replace(DEFAULT_SETTINGS, most_groupings=2),
    "no spreading, no orders": replace(DEFAULT_SETTINGS, spread_within=0.0),
    "no orders of injection": replace(DEFAULT_SETTINGS, most_ordered=0),
    "meshes that are far, as others": replace(DEFAULT_SETTINGS, patience_far=1 << 30),
    "overlap as far as it may win": replace(DEFAULT_SETTINGS, overlaps_seen=1 << 30),
    "no overlap": replace(DEFAULT_SETTINGS, modes=()),
    "no intra": replace(DEFAULT_SETTINGS, modes=("interleaved",)),
    "no interleaved": replace(DEFAULT_SETTINGS, modes=("intra",)),
    "overlap of one schedule": replace(DEFAULT_SETTINGS, most_orchestrated=1),
    "patience 3": replace(DEFAULT_SETTINGS, patience=3, patience_of_few=(3, 6)),
    "patience 6": replace(DEFAULT_SETTINGS, patience=6, patience_of_few=(6, 12)),
    "all partitions of 9 tasks only": replace(DEFAULT_SETTINGS, all_partitions_up_to=9),
    "8 proposals a mesh": replace(DEFAULT_SETTINGS, per_mesh=8),
    "8 paces": replace(DEFAULT_SETTINGS, paces=8),
    "16 numbers of groups": replace(DEFAULT_SETTINGS, most_counts=16),
}
"""The search with one stage left out or weakened."""


WHOLE = "all stages"
"""The search as it is."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A workload on a testbed."""

    seed: int
    tasks: int
    testbed: str
    memory: float
    """Share of the devices' memory that there is."""

    def problem(self, settings: SearchSettings) -> PlanningProblem:
        """The problem, with nothing priced."""
        model = load_model_spec("llama2-7b")
        cluster = self._cluster()
        costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
        workload = random_workload(self.seed, tasks=self.tasks)
        return PlanningProblem(workload, model, cluster, costs, settings=settings)

    def _cluster(self) -> ClusterSpec:
        cluster = load_cluster(self.testbed)
        bytes_ = round(self.memory * cluster.device.memory_bytes)
        return cluster.model_copy(
            update={"device": cluster.device.model_copy(update={"memory_bytes": bytes_})}
        )

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.tasks} tasks on {self.testbed}, {self.memory:.0%} of the memory"


@dataclass(frozen=True, slots=True)
class Search:
    """Result of a search."""

    iteration_s: float
    """Infinite if nothing fits."""
    cpu_s: float


def draw_instances(count: int, first_seed: int = 0) -> list[Instance]:
    """Instances that go through testbeds and numbers of tasks evenly."""
    return [
        Instance(
            seed=seed,
            tasks=TASKS[seed % len(TASKS)],
            testbed=TESTBEDS[seed % len(TESTBEDS)],
            memory=LESS_MEMORY if seed // 3 % 3 == 2 else 1.0,
        )
        for seed in range(first_seed, first_seed + count)
    ]


def measure(instance: Instance, settings: SearchSettings = DEFAULT_SETTINGS) -> Search:
    """Search once, in a fresh problem."""
    problem = instance.problem(settings)
    start_s = time.process_time()
    try:
        iteration_s = search_structures(problem).outcomes[0].value
    except SpecError:
        iteration_s = math.inf
    return Search(iteration_s, time.process_time() - start_s)


def ablate(
    instance: Instance,
    stages: Iterable[str],
    step: Callable[[], None] = lambda: None,
    known: Mapping[str, Search] = MappingProxyType({}),
) -> dict[str, Search]:
    """Searches of an instance, with all stages (:data:`WHOLE`) and without each of some.

    Args:
        instance: What is planned.
        stages: Keys of :data:`STAGES`.
        step: Called after every search.
        known: Searches of the instance that need not be done again. With another stage, the search with all
            is, as times are compared with it.
    """
    wanted = (WHOLE, *stages)
    if known.keys() >= set(wanted):
        return {stage: known[stage] for stage in wanted}
    measure(instance)  # whatever is remembered from problem to problem is remembered from now on
    found = {}
    for stage in wanted:
        found[stage] = measure(instance, STAGES.get(stage, DEFAULT_SETTINGS))
        step()
    return found


def read_rows(path: Path | None) -> dict[str, dict[str, Search]]:
    """Searches by instance that an earlier run kept; none if there is no file."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text())
    return {name: {stage: Search(*search) for stage, search in row.items()} for name, row in rows.items()}


def keep_rows(path: Path, found: Mapping[str, Mapping[str, Search]]) -> None:
    """Write what :func:`read_rows` reads."""
    rows = {name: {stage: astuple(each) for stage, each in row.items()} for name, row in found.items()}

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(rows))

    write_atomically(path, write)


def ablation_table(found: Sequence[dict[str, Search]]) -> str:
    """A row per stage, over the instances for which something fits."""
    header = ["search", "slower: median", "p90", "worst", "worse", "time", "refused"]
    rows = []
    fit = [each for each in found if math.isfinite(each[WHOLE].iteration_s)]
    for stage in fit[0]:
        ratios = np.array([each[stage].iteration_s / each[WHOLE].iteration_s for each in fit])
        times = np.array([each[stage].cpu_s / each[WHOLE].cpu_s for each in fit])
        fits = np.isfinite(ratios)
        median, p90, worst = (np.percentile(ratios[fits], q, method="higher") - 1 for q in (50, 90, 100))
        rows.append(
            [
                stage,
                *(f"{each:+.2%}" for each in (median, p90, worst)),
                f"{np.mean(ratios > 1 + WORSE):.0%}",
                f"{np.median(times):.2f}",
                str(int((~fits).sum())),
            ]
        )
    return format_table(header, rows)


@contextmanager
def bar(steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415  # only for the bar
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("searching", total=steps)
        yield lambda: shown.advance(task)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of: " + ", ".join(STAGES))
    parser.add_argument("--out", type=Path, help="JSON with the searches one by one")
    args = parser.parse_args()
    stages = args.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages {unknown[0]!r}: expected some of {', '.join(STAGES)}")
    instances = draw_instances(args.instances, args.first_seed)
    print(machine_line(), flush=True)
    kept = read_rows(args.out)
    found: list[dict[str, Search]] = []
    with bar(len(instances) * (1 + len(stages))) as step:
        for instance in instances:
            found.append(ablate(instance, stages, step, kept.get(str(instance), {})))
            kept[str(instance)] = found[-1]
            if args.out is not None:
                keep_rows(args.out, kept)
    print(f"{len(instances)} instances\n\n{ablation_table(found)}")


if __name__ == "__main__":
    main()
