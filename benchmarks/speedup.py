"""How much faster are eight mixed tasks multiplexed than as instances that take turns?

Every plan is executed for real on two one-thread ranks (llama-tiny, pp=2), in rounds one after the other, so
that all see the same machine. What the sides do:

muxtune        the plan that the search finds with this machine's profile
nemo           an instance per task, each with its own copy of the backbone on both ranks; they take turns,
               each a 1F1B pipeline that fills and drains; sequences padded to the task's ``max_length``
nemo, packed   a what-if without padding, which leaves only the turns, the drains and small micro-batches
sl-peft        one backbone, all tasks in one batch, padded to the longest ``max_length`` of all
spatial-only   all tasks in one batch, but packed or chunked as muxtune does
temporal-only  no two tasks in a batch, but interleaved as muxtune does
peft loop      transformers and peft, the tasks one after another in one process with two threads;
               micro-batches of the task's own size, padded to their longest sequence; logits of all tokens,
               as transformers computes them; sdpa attention

All plans are executed by the same runtime, with the same kernels, head and loss at target tokens only, and
one thread per rank. All sides train the same tasks on the same data with the same optimizer. Effective
tokens/s are the examples' tokens over the median time of a steady iteration; of the loop, over the sum of
every task's median step. Loading and initialization are not counted. Prints medians over rounds.

    python -m benchmarks.speedup [--rounds 3] [--steps 12] [--profile P.parquet]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.helpers.machine import machine_costs, machine_line
from benchmarks.helpers.peft_loop import measure_peft_loop
from experiments.workloads import mixed_workload
from muxtune.cluster import load_cluster
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.support.tables import format_table, show_bytes, show_rate
from runtime import RunReport, run_plan
from sim import search_plan

CASES: dict[str, tuple[str, PlanOptions]] = {
    "muxtune": ("muxtune", PlanOptions()),
    "nemo": ("nemo", PlanOptions()),
    "nemo, packed": ("nemo", PlanOptions(alignment="pack")),
    "sl-peft": ("sl-peft", PlanOptions()),
    "spatial-only": ("spatial-only", PlanOptions()),
    "temporal-only": ("temporal-only", PlanOptions()),
}
"""Policies with their options."""

LOOP = "peft loop"

BARS = {"nemo": 2.0, "sl-peft": 1.3, LOOP: 1.3}
"""How many times as many effective tokens/s ``muxtune`` shall reach."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    arguments = parser.parse_args()

    model, cluster = load_model_spec("llama-tiny"), load_cluster("cpu-2")
    costs = machine_costs(model, arguments.profile)
    workload = mixed_workload(arguments.steps)
    plans = {
        case: search_plan(workload, model, cluster, costs, policy=policy, options=options)
        for case, (policy, options) in CASES.items()
    }

    reports: dict[str, list[RunReport]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        rates[LOOP].append(measure_peft_loop(arguments.steps, threads=2))
        for case, plan in plans.items():
            with tempfile.TemporaryDirectory() as folder:
                reports[case].append(run_plan(plan, Path(folder) / "run"))
            rates[case].append(reports[case][-1].effective_tokens_per_s)

    print(f"machine: {machine_line()}")
    print(f"8 mixed tasks, llama-tiny, {arguments.rounds} rounds of {arguments.steps} steps")
    print(case_table(plans, reports, rates))
    print(bar_table(rates))


def case_table(
    plans: Mapping[str, Plan],
    reports: Mapping[str, Sequence[RunReport]],
    rates: Mapping[str, Sequence[float]],
) -> str:
    """Every side with its rate and its plan."""
    rows = []
    for case in [*plans, LOOP]:
        rate = median(rates[case])
        times, backbone, shape = ["", ""], "", "2 threads"
        if case in plans:
            measured_s = median(report.median_iteration_s for report in reports[case])
            times = [f"{seconds:.3f}" for seconds in (plans[case].predicted.iteration_s, measured_s)]
            backbone = ", ".join(show_bytes(memory.backbone_bytes) for memory in reports[case][0].memory)
            shape = (
                f"{len(plans[case].htasks)} hTasks, {plans[case].template}, pp {plans[case].parallelism.pp}"
            )
        spread = f"{min(rates[case]):.0f}-{max(rates[case]):.0f}"
        ratio = f"{median(rates['muxtune']) / rate:.2f}x"
        rows.append([case, show_rate(rate), spread, ratio, *times, shape, backbone])
    header = ["side", "effective tokens/s", "spread", "muxtune is", "predicted s", "measured s", "plan"]
    return format_table([*header, "backbone per rank"], rows)


def bar_table(rates: Mapping[str, Sequence[float]]) -> str:
    """The ratios that are promised."""
    rows = []
    for case, bar in BARS.items():
        ratio = median(rates["muxtune"]) / median(rates[case])
        rows.append([f"muxtune against {case}", f"{ratio:.2f}x", f"{bar}x", "yes" if ratio >= bar else "no"])
    return format_table(["effective tokens/s", "ratio", "bar", "reached"], rows)


if __name__ == "__main__":
    main()
