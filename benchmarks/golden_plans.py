"""Are the plans of before still the plans of today?

Plans random problems (:mod:`benchmarks.helpers.fusion_instances`) with the policy ``muxtune``, most on
their own mesh and others on any mesh of a testbed, and compares decisions and predictions with what a
file holds:

    python -m benchmarks.golden_plans --write FILE [--instances 200]    what this checkout plans
    python -m benchmarks.golden_plans FILE [--instances 200]            does this checkout plan the same?

The exit code is 1 if anything differs. ``tests/data/golden_plans.json`` holds instances for the test suite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.helpers.fusion_instances import MODELS, draw_instance, gpu_costs
from benchmarks.helpers.machine import machine_line
from muxtune.cluster import TESTBEDS
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import NotEnoughMemoryError
from sim import search_problem

RELATIVE_TOLERANCE = 1e-12
"""Largest relative difference of a predicted number that counts as the same."""
TESTBED_EVERY = 5
"""The tasks of one instance of so many are planned for a testbed instead, half of them with tp 2."""


def plan_record(seed: int) -> dict[str, Any]:
    """Decisions and predictions of an instance's plan; the bytes that a refusal names where nothing fits."""
    instance = draw_instance(seed)
    problem = instance.problem
    options = PlanOptions(tp=1, pp=instance.pp, dp=instance.dp)
    if seed % TESTBED_EVERY == 0:
        number = seed // TESTBED_EVERY
        cluster = list(TESTBEDS.values())[number % len(TESTBEDS)]
        model = MODELS["gpu"][0]
        problem = PlanningProblem(instance.workload, model, cluster, gpu_costs(model, cluster))
        options = PlanOptions(tp=2) if number % 2 else PlanOptions()
    try:
        plan = search_problem(problem, options=options)
    except NotEnoughMemoryError as error:
        return {"refused": [error.needed_bytes, error.nearest_bytes]}
    predicted = plan.predicted
    decisions = {
        "parallelism": plan.parallelism.model_dump(mode="json"),
        "htasks": [htask.model_dump(mode="json") for htask in plan.htasks],
        "buckets": [list(bucket) for bucket in plan.buckets],
        "template": plan.template,
        "orchestration": plan.orchestration.mode,
        "adapters": plan.orchestration.adapters,
        "schedule": _digest([[list(action) for action in stage] for stage in plan.schedule]),
        "launches": _digest([launch.model_dump(mode="json") for launch in plan.orchestration.launches]),
    }
    numbers = {
        "iteration_s": predicted.iteration_s,
        "lower_bound_s": predicted.lower_bound_s,
        "makespan_s": predicted.makespan_s,
        "bubble_fraction": predicted.bubble_fraction,
        "effective_tokens_per_s": predicted.effective_tokens_per_s,
        "peak_memory_bytes": list(predicted.peak_memory_bytes),
        "fwd_s": [list(stage) for stage in predicted.fwd_s],
        "bwd_s": [list(stage) for stage in predicted.bwd_s],
        "p2p_s": list(predicted.p2p_s),
    }
    return {"decisions": decisions, "predicted": numbers}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: object, now: object, where: str = "") -> list[str]:
    """What is not the same, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for i, (b, n) in pairs for line in differences(b, n, f"{where}.{i}")]
    numbers = isinstance(before, float | int) and isinstance(now, float | int)
    if numbers and abs(before - now) <= RELATIVE_TOLERANCE * max(abs(before), abs(now)):
        return []
    return [] if before == now else [f"{where}: {before!r} before, {now!r} now"]


def main() -> None:
    """Write records, or print what differs from them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="records to compare with")
    parser.add_argument("--write", type=Path, help="write the records of this checkout")
    parser.add_argument("--instances", type=int, default=200)
    args = parser.parse_args()
    if (args.file is None) == (args.write is None):
        parser.error("give a file to compare with, or --write")
    if args.write is not None:
        lines = [f'"{seed}": {json.dumps(plan_record(seed))}' for seed in range(args.instances)]
        args.write.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    print(machine_line())
    before = json.loads(args.file.read_text())
    seeds = list(before)[: args.instances]
    lines = [
        line for seed in seeds for line in differences(before[seed], plan_record(int(seed)), f"seed {seed}")
    ]
    print(*lines, f"{len(seeds)} plans, {len(lines)} differences", sep="\n")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
