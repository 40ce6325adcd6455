"""What does it buy that an hTask may hold tasks of several PEFT methods?

The same tasks are given 1 to 5 methods in turn and planned by ``muxtune`` and by
``muxtune-one-method-per-htask``, which is ``muxtune`` without mixing. Prints effective tokens per second of
both, and draws their ratio over the number of methods.

    python -m experiments.mixing [--cluster testbed-a] [--model llama2-7b] [--tasks 8] [--out mixing.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import plan_problem
from muxtune.policies.one_method import NAME
from muxtune.support.tables import format_table
from muxtune.tasks import workload_from

__all__ = ["METHODS", "Mixing", "draw_mixing", "measure_mixing", "mixing_table"]

METHODS: tuple[dict[str, object], ...] = (
    {"method": "lora", "r": 16, "alpha": 16, "targets": ["all-linear"]},
    {"method": "bottleneck", "size": 64},
    {"method": "ia3", "targets": ["all-linear"]},
    {"method": "prefix_tuning", "num_virtual_tokens": 16},
    {"method": "prompt_tuning", "num_virtual_tokens": 20},
)
_LENGTHS = (("sst2", 64), ("openbookqa", 128), ("rte", 256))
_MICRO_BATCHES = (4, 2, 1)
_MICROBATCHES_PER_STEP = 4


@dataclass(frozen=True, slots=True)
class Mixing:
    """One number of methods."""

    methods: int
    mixed_tokens_per_s: float
    """Effective tokens per second where hTasks may mix methods."""
    apart_tokens_per_s: float
    """Effective tokens per second where they may not."""
    mixed_htasks: int
    apart_htasks: int

    @property
    def gain(self) -> float:
        """Throughput with mixing over that without."""
        return self.mixed_tokens_per_s / self.apart_tokens_per_s


def measure_mixing(cluster_name: str, model_name: str, tasks: int, methods: Sequence[int]) -> list[Mixing]:
    """Plan the tasks with so many methods each time.

    Args:
        cluster_name: A cluster of GPUs with shipped coefficients.
        model_name: The backbone.
        tasks: Number of tasks; lengths and micro-batch sizes go round.
        methods: Numbers of methods, 1 to the length of :data:`METHODS`.

    Raises:
        UserError: No such cluster or model, or nothing fits its memory.
    """
    cluster, model = load_cluster(cluster_name), load_model_spec(model_name)
    costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    found = []
    for count in methods:
        content = []
        for i in range(tasks):
            lengths, longest = _LENGTHS[i % len(_LENGTHS)]
            micro = _MICRO_BATCHES[i % len(_MICRO_BATCHES)]
            content.append(
                {
                    "id": f"t{i}",
                    "peft": METHODS[i % count],
                    "dataset": {"lengths": lengths},
                    "global_batch_size": micro * _MICROBATCHES_PER_STEP,
                    "micro_batch_size": micro,
                    "max_length": longest,
                    "learning_rate": 1e-4,
                    "steps": 10,
                    "seed": i,
                }
            )
        workload = workload_from({"tasks": content}, "workload", None)  # type: ignore[arg-type]
        problem = PlanningProblem(workload, model, cluster, costs)
        mixed, apart = plan_problem(problem)[0], plan_problem(problem, policy=NAME)[0]
        mixed_rate, apart_rate = (p.predicted.effective_tokens_per_s for p in (mixed, apart))
        found.append(Mixing(count, mixed_rate, apart_rate, len(mixed.htasks), len(apart.htasks)))
    return found


def mixing_table(results: Sequence[Mixing]) -> str:
    """One row per number of methods."""
    header = ["methods", "mixed: tokens/s", "hTasks", "one method each: tokens/s", "hTasks", "gain"]
    return format_table(
        header,
        [
            [
                str(each.methods),
                f"{each.mixed_tokens_per_s:.0f}",
                str(each.mixed_htasks),
                f"{each.apart_tokens_per_s:.0f}",
                str(each.apart_htasks),
                f"{each.gain:.3f}",
            ]
            for each in results
        ],
    )


def draw_mixing(results: Sequence[Mixing], path: Path, *, title: str) -> None:
    """Draw both throughputs and their ratio over the number of methods."""
    import matplotlib.pyplot as plt

    figure, (rates, gains) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    methods = [each.methods for each in results]
    rates.plot(methods, [each.mixed_tokens_per_s for each in results], "o-", label="hTasks may mix methods")
    rates.plot(methods, [each.apart_tokens_per_s for each in results], "s--", label="one method per hTask")
    rates.set(xlabel="PEFT methods", ylabel="effective tokens/s", xticks=methods, ylim=(0, None))
    rates.legend(fontsize="small")
    gains.bar(methods, [each.gain for each in results], color="tab:green")
    gains.axhline(1.0, color="black", linewidth=0.8)
    gains.set(xlabel="PEFT methods", ylabel="throughput, mixed over apart", xticks=methods)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", default="testbed-a")
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("mixing.png"))
    args = parser.parse_args()
    results = measure_mixing(args.cluster, args.model, args.tasks, range(1, len(METHODS) + 1))
    print(mixing_table(results))
    draw_mixing(results, args.out, title=f"{args.tasks} tasks on {args.model}, {args.cluster}")


if __name__ == "__main__":
    main()
