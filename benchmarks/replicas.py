"""Is a second replica as much faster, or slower, as predicted?

The same workload is planned and executed on one one-thread rank and on two replicas (dp 1 and dp 2, pp 1), in
rounds one after the other, so that both see the same machine:

    one sequence  one of 1024 tokens a step: the second replica only sums gradients
    one is long   one of 1024 tokens and seven of 128: the long one decides
    alike         sixteen of 128 tokens, half of them for each replica

Ratios are dp 2 over dp 1, so above 1 a second replica slows the workload down; ``same side`` says whether
prediction and measurement agree on that. ``beside another`` is dp 1 while a second process runs the same
plan, over dp 1 alone: what two ranks take from each other (memory bandwidth, caches and, if the machine has
fewer cores, the processor) without any sum. A profile prices operators as several ranks measured them at
once, so where this is far from 1 it is dp 1 that is faster than predicted.

    python -m benchmarks.replicas [--rounds 3] [--steps 12] [--profile P.parquet]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.helpers.machine import machine_costs, machine_line
from muxtune.cluster import load_cluster
from muxtune.costs import CostModel
from muxtune.model import ModelSpec, load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.support.tables import format_table, show_seconds
from muxtune.tasks import workload_from
from runtime import run_plan
from sim import search_plan

CASES: dict[str, tuple[int, ...]] = {
    "one sequence": (1024,),
    "one is long": (1024, *[128] * 7),
    "alike": (128,) * 16,
}
"""Tokens of the sequences of a step."""

MICRO_BATCH = 4
"""Sequences, at most."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A workload on one and on two replicas."""

    name: str
    one: Plan
    two: Plan

    @property
    def predicted(self) -> float:
        """Iteration with two replicas over that with one."""
        return self.two.predicted.iteration_s / self.one.predicted.iteration_s


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    arguments = parser.parse_args()

    model = load_model_spec("llama-tiny")
    costs = machine_costs(model, arguments.profile)
    measured_s: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            plan_pair(name, lengths, model, costs, Path(folder), arguments.steps)
            for name, lengths in CASES.items()
        ]
        for _ in range(arguments.rounds):
            for pair in pairs:
                measured_s[pair.name, "one"].append(run(pair.one))
                measured_s[pair.name, "two"].append(run(pair.two))
                measured_s[pair.name, "beside"].append(run_beside_another(pair.one))
    print(f"machine: {machine_line()}")
    print(f"llama-tiny, pp 1, {arguments.rounds} rounds of {arguments.steps} steps")
    rows = [
        row(pair, *(median(measured_s[pair.name, kind]) for kind in ("one", "two", "beside")))
        for pair in pairs
    ]
    print(format_table(_COLUMNS, rows))


_COLUMNS = (
    "a step",
    "dp 1, predicted",
    "measured",
    "dp 2, predicted",
    "measured",
    "beside another",
    "ratio, predicted",
    "ratio, measured",
    "same side",
)


def row(pair: Pair, one_s: float, two_s: float, beside_s: float) -> list[str]:
    """Cells of one workload."""
    measured = two_s / one_s
    return [
        pair.name,
        show_seconds(pair.one.predicted.iteration_s),
        show_seconds(one_s),
        show_seconds(pair.two.predicted.iteration_s),
        show_seconds(two_s),
        f"{beside_s / one_s:.2f}x",
        f"{pair.predicted:.3f}x",
        f"{measured:.3f}x",
        "yes" if (pair.predicted > 1) == (measured > 1) else "no",
    ]


def plan_pair(
    name: str, lengths: tuple[int, ...], model: ModelSpec, costs: CostModel, folder: Path, steps: int
) -> Pair:
    """Plan a workload of one task, whose every step has sequences of these lengths."""
    rng = random.Random(0)
    data = folder / f"{name.replace(' ', '-')}.jsonl"
    # A token for every byte, and two around them.
    texts = ["".join(rng.choice("abcdefg ") for _ in range(length - 2)) for length in lengths]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "id": "task",
        "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "dataset": {"path": data.name},
        "global_batch_size": len(lengths),
        "micro_batch_size": min(MICRO_BATCH, len(lengths)),
        "max_length": max(lengths),
        "learning_rate": 1e-3,
        "steps": steps,
    }
    workload = workload_from({"tasks": [task]}, name, folder)
    cluster = load_cluster("cpu-2")
    one, two = (
        search_plan(
            workload,
            model,
            cluster,
            costs,
            policy="muxtune",
            options=PlanOptions(tp=1, pp=1, dp=dp, alignment="pack", template="flush"),
        )
        for dp in (1, 2)
    )
    return Pair(name, one, two)


def run(plan: Plan) -> float:
    """Seconds of a steady iteration, executed for real."""
    with tempfile.TemporaryDirectory() as folder:
        return run_plan(plan, Path(folder) / "run").median_iteration_s


def run_beside_another(plan: Plan) -> float:
    """Seconds of a steady iteration while a second process executes the same plan; the longer of both."""
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(run, [plan, plan]))


if __name__ == "__main__":
    main()
