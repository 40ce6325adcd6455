"""How far is the fusion that ``muxtune`` finds from the best of all set partitions, or of a local search?

Draws problems (device, backbone, mesh, tasks and memory, see :mod:`benchmarks.helpers.fusion_instances`),
plans each by dynamic programming alone, by the policy ``muxtune``, and exhaustively or, where there are too
many partitions for that, by a long local search with exact prices, and prints the distribution of

    gap = iteration time / iteration time of the best partition - 1

which is negative where the local search misses what the policy finds.

    python -m benchmarks.fusion_gap [--instances 500] [--first-seed 0] [--most-tasks 8] [--methods]
    python -m benchmarks.fusion_gap --least-tasks 10 --most-tasks 12 --against local-search --instances 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from benchmarks.helpers.fusion_instances import Instance, draw_instance
from benchmarks.helpers.machine import machine_line
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.oracle.exhaustive import best_in_all_streams, task_appraiser
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.refinement.appraiser import Appraised
from muxtune.planning.refinement.local_search import THOROUGH, dp_starts, refined_partitions
from muxtune.policies import POLICIES
from muxtune.support.errors import SpecError

PROMISED = 0.01
"""Largest gap that the design allows."""
ROUNDING = 1e-9

Against = Literal["all", "local-search"]
"""What the search is held against: all set partitions, or a long local search."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An instance, planned in three ways; None where nothing was found that fits the memory."""

    instance: Instance
    best_s: float | None
    """Iteration of the best of all set partitions, or of the best that the local search finds."""
    found_s: float | None
    """Iteration of the policy ``muxtune``."""
    contiguous_s: float | None
    """Best iteration of the dynamic programming on tokens alone."""
    search_wall_s: float
    reference_wall_s: float

    @property
    def agree(self) -> bool:
        """Whether both or neither found a plan that fits."""
        return (self.best_s is None) == (self.found_s is None)

    @property
    def gap(self) -> float:
        """Gap of the search; infinite where it misses that there is a plan."""
        return _gap(self.found_s, self.best_s)

    @property
    def contiguous_gap(self) -> float:
        """Gap of the dynamic programming alone."""
        return _gap(self.contiguous_s, self.best_s)

    def __str__(self) -> str:
        return f"{self.instance}: gap {self.gap:.3%}, by dynamic programming alone {self.contiguous_gap:.2%}"


def _gap(seconds: float | None, best_s: float | None) -> float:
    if best_s is None:
        return 0.0
    return float("inf") if seconds is None else seconds / best_s - 1


def measure(instance: Instance, against: Against = "all") -> Outcome:
    """Plan an instance in three ways, the search first and with nothing priced before."""
    options = PlanOptions(tp=1, pp=instance.pp, dp=instance.dp)
    start_s = time.perf_counter()
    found_s = _searched_s(instance.problem, options)
    found_at_s = time.perf_counter()
    if against == "all":
        best, (appraiser, *_) = best_in_all_streams(instance.problem, options)
    else:
        appraiser = task_appraiser(instance.problem, options)
        best = refined_partitions(appraiser, THOROUGH)
    best_at_s = time.perf_counter()
    contiguous = [appraiser.appraise(groups) for groups in dp_starts(appraiser.table, 1)]
    return Outcome(
        instance=instance,
        best_s=_fastest_s(best),
        found_s=found_s,
        contiguous_s=_fastest_s([each for each in contiguous if each is not None]),
        search_wall_s=found_at_s - start_s,
        reference_wall_s=best_at_s - found_at_s,
    )


def _searched_s(problem: PlanningProblem, options: PlanOptions) -> float | None:
    try:
        structures = POLICIES.get("muxtune").propose(problem, options)
    except SpecError:
        return None
    return structure_iteration_s(problem, structures[0])


def _fastest_s(found: Sequence[Appraised]) -> float | None:
    return min((each.seconds for each in found), default=None)


def report(outcomes: Sequence[Outcome]) -> str:
    """Distribution of the gaps, and the worst case."""
    fit = [each for each in outcomes if each.best_s is not None]
    lines = [f"{len(outcomes)} instances, {len(fit)} with a plan that fits the memory"]
    for name, gaps in (
        ("search", np.array([each.gap for each in fit])),
        ("dynamic programming on tokens alone", np.array([each.contiguous_gap for each in fit])),
    ):
        p50, p90, p99 = np.percentile(gaps, [50, 90, 99], method="higher")
        lines.append(
            f"{name}: optimal {np.mean(gaps < ROUNDING):.1%}, within 1% {np.mean(gaps <= PROMISED):.1%}, "
            f"median gap {p50:.3%}, p90 {p90:.3%}, p99 {p99:.3%}, worst {gaps.max():.3%}, "
            f"no plan found {np.sum(np.isinf(gaps))}"
        )
    worst = max(fit, key=lambda each: each.gap)
    walls = [(each.search_wall_s, each.reference_wall_s) for each in outcomes]
    search_s, exhaustive_s = np.array(walls).T
    lines += [
        f"worst case: {worst}",
        f"search {search_s.mean():.2f} s (worst {search_s.max():.2f}); the reference, with what is "
        f"priced so far, {exhaustive_s.mean():.2f} s (worst {exhaustive_s.max():.2f})",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print one line per gap and the distribution."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--least-tasks", type=int, default=2)
    parser.add_argument("--most-tasks", type=int, default=8)
    parser.add_argument("--methods", action="store_true", help="tasks of several PEFT methods")
    parser.add_argument("--against", choices=get_args(Against), default="all")
    parser.add_argument("--above", type=float, default=0.001, help="gaps that get a line")
    args = parser.parse_args()
    print(machine_line())
    outcomes = []
    for seed in range(args.first_seed, args.first_seed + args.instances):
        instance = draw_instance(
            seed, most_tasks=args.most_tasks, least_tasks=args.least_tasks, methods=args.methods
        )
        outcomes.append(measure(instance, args.against))
        if outcomes[-1].gap > args.above:
            print(outcomes[-1], flush=True)
    print(report(outcomes))


if __name__ == "__main__":
    main()
