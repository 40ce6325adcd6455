"""How much faster are eight mixed tasks multiplexed than as instances that take turns?

Every policy's plan is executed for real on two one-thread ranks, in rounds one after the other, so that all
see the same machine; so is a plain loop of transformers and peft that trains the tasks one after another in
one process with two threads. Prints effective tokens/s (medians over rounds), the ratio, and backbone bytes
per rank.

    python -m benchmarks.speedup [--rounds 3] [--steps 12] [--profile P.parquet]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.machine import machine_line
from benchmarks.peft_loop import measure_peft_loop
from experiments.workloads import mixed_workload
from muxtune.cluster import load_cluster
from muxtune.costs import ProfiledCosts, load_profile
from muxtune.model import load_model_spec
from muxtune.planning.options import PlanOptions
from profiler import profile_model
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
"""Policies; ``nemo, packed`` is a what-if without padding, which leaves only the turns and drains."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    arguments = parser.parse_args()

    model, cluster = load_model_spec("llama-tiny"), load_cluster("cpu-2")
    profile = load_profile(arguments.profile) if arguments.profile else profile_model(model, progress=True)
    costs = ProfiledCosts(profile, model)
    workload = mixed_workload(arguments.steps)
    plans = {
        case: search_plan(workload, model, cluster, costs, policy=policy, options=options)
        for case, (policy, options) in CASES.items()
    }

    reports: dict[str, list[RunReport]] = defaultdict(list)
    loop: list[float] = []
    for _ in range(arguments.rounds):
        loop.append(measure_peft_loop(arguments.steps, threads=2))
        for case, plan in plans.items():
            with tempfile.TemporaryDirectory() as folder:
                reports[case].append(run_plan(plan, Path(folder) / "run"))

    print(f"machine: {machine_line()}")
    print(f"8 mixed tasks, llama-tiny, pp=2, {arguments.rounds} rounds of {arguments.steps} steps")
    print(
        f"{'policy':14} {'effective tok/s':>16} {'spread':>15} {'muxtune is':>11} "
        f"{'predicted s':>12} {'measured s':>11} {'backbone MB per rank':>21}"
    )
    base = median(r.effective_tokens_per_s for r in reports["muxtune"])
    for case, runs in reports.items():
        rates = sorted(r.effective_tokens_per_s for r in runs)
        rate = median(rates)
        backbone = ", ".join(f"{m.backbone_bytes / 1e6:.1f}" for m in runs[0].memory)
        print(
            f"{case:14} {rate:16.0f} {f'{rates[0]:.0f}-{rates[-1]:.0f}':>15} {base / rate:10.2f}x "
            f"{plans[case].predicted.iteration_s:12.4f} "
            f"{median(r.median_iteration_s for r in runs):11.4f} {backbone:>21}"
        )
    print(
        f"{'peft loop':14} {median(loop):16.0f} {f'{min(loop):.0f}-{max(loop):.0f}':>15} "
        f"{base / median(loop):10.2f}x   one task after another, 2 threads"
    )


if __name__ == "__main__":
    main()
