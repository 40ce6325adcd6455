"""How well is the iteration time of a workload predicted that the profiler has not seen?

Profiles this machine, then plans and executes random workloads (tasks, lengths, ranks, batch sizes, targets
drawn from a seed; policies, templates and pp take turns) and prints every case.

    python -m benchmarks.accuracy [--cases 5] [--steps 10] [--profile P.parquet] [--seed 0]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.machine import machine_line
from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.costs import ProfiledCosts, load_profile
from muxtune.model import load_model_spec
from muxtune.planning.options import PlanOptions
from profiler import profile_model
from runtime import run_plan
from sim import search_plan

CASES: tuple[tuple[str, PlanOptions], ...] = (
    ("muxtune", PlanOptions()),
    ("temporal-only", PlanOptions(template="flush")),
    ("nemo", PlanOptions()),
    ("muxtune", PlanOptions(pp=1)),
    ("sl-peft", PlanOptions()),
)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    arguments = parser.parse_args()

    model, cluster = load_model_spec("llama-tiny"), load_cluster("cpu-2")
    profile = load_profile(arguments.profile) if arguments.profile else profile_model(model, progress=True)
    costs = ProfiledCosts(profile, model)

    print(f"machine: {machine_line()}")
    print(
        f"{'case':28} {'tasks':>5} {'pp':>3} {'template':10} {'predicted s':>12} {'measured s':>11} "
        f"{'error':>7} {'busy error per stage':>22}"
    )
    errors: list[float] = []
    for number in range(arguments.cases):
        policy, options = CASES[number % len(CASES)]
        workload = random_workload(arguments.seed + number, steps=arguments.steps)
        plan = search_plan(workload, model, cluster, costs, policy=policy, options=options)
        with tempfile.TemporaryDirectory() as folder:
            report = run_plan(plan, Path(folder) / "run")
        predicted, measured = plan.predicted.iteration_s, report.median_iteration_s
        errors.append(predicted / measured - 1)
        busy = [
            sum(m * (f + b) for m, f, b in zip(plan.microbatches, fwd, bwd, strict=True))
            for fwd, bwd in zip(plan.predicted.fwd_s, plan.predicted.bwd_s, strict=True)
        ]
        busy_errors = [f"{p / m - 1:+.1%}" for p, m in zip(busy, report.busy_s, strict=True)]
        print(
            f"{f'{number}: {policy}, seed {arguments.seed + number}':28} {len(plan.tasks):5} "
            f"{plan.parallelism.pp:3} {plan.template:10} {predicted:12.4f} {measured:11.4f} "
            f"{errors[-1]:+7.1%} {' '.join(busy_errors):>22}",
            flush=True,
        )
    absolute = [abs(error) for error in errors]
    print(f"mean error {sum(absolute) / len(absolute):.1%}, largest {max(absolute):.1%}")


if __name__ == "__main__":
    main()
