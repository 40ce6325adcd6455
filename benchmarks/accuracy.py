"""How well is the iteration time of a workload predicted that the profiler has not seen?

Profiles this machine, then plans and executes random workloads (tasks, lengths, ranks, batch sizes, targets
drawn from a seed; policies, templates and pp take turns) and prints every case. The operators of every case
are measured by class too: classes that err in opposite directions cancel in the mean error, so both are
printed together.

With ``--methods``, two of three tasks have another PEFT method than LoRA, so that the cases have all of them;
classes are not measured then, as they are told apart by the functions of LoRA alone.

    python -m benchmarks.accuracy [--cases 10] [--steps 10] [--profile P.parquet] [--seed 0] [--no-classes]
                                  [--methods]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.helpers.machine import machine_costs, machine_line
from benchmarks.helpers.operator_classes import CLASSES, class_totals
from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from runtime import run_plan
from runtime.reports.report import RunReport
from sim import search_plan

CASES: tuple[tuple[str, PlanOptions], ...] = (
    ("muxtune", PlanOptions()),
    ("temporal-only", PlanOptions(template="flush")),
    ("nemo", PlanOptions()),
    ("muxtune", PlanOptions(pp=1)),
    ("sl-peft", PlanOptions()),
    ("muxtune", PlanOptions(template="flush")),
    ("spatial-only", PlanOptions()),
    ("temporal-only", PlanOptions(template="continuous")),
    ("sl-peft", PlanOptions(pp=1)),
    ("muxtune", PlanOptions(template="continuous")),
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Relative errors of one case, predicted / measured - 1."""

    iteration: float
    busy: tuple[float, ...]
    """Per stage: the work of one iteration."""


def compare(plan: Plan, report: RunReport) -> Accuracy:
    """Errors of a plan's prediction. Work is summed from the medians of its actions."""
    m = plan.microbatches
    predicted = [
        sum(n * (f + b) for n, f, b in zip(m, fwd, bwd, strict=True))
        for fwd, bwd in zip(plan.predicted.fwd_s, plan.predicted.bwd_s, strict=True)
    ]
    measured = [
        sum(n * (f + b) + step for n, f, b, step in zip(m, *stage, strict=True))
        for stage in zip(report.fwd_s, report.bwd_s, report.step_s, strict=True)
    ]
    return Accuracy(
        plan.predicted.iteration_s / report.median_iteration_s - 1,
        tuple(p / q - 1 for p, q in zip(predicted, measured, strict=True)),
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="of this machine; measured now if absent")
    either = argparse.BooleanOptionalAction
    parser.add_argument("--classes", action=either, default=True, help="measure the operators by class, too")
    parser.add_argument("--methods", action="store_true", help="tasks of all PEFT methods")
    arguments = parser.parse_args()
    classified = arguments.classes and not arguments.methods

    model, cluster = load_model_spec("llama-tiny"), load_cluster("cpu-2")
    costs = machine_costs(model, arguments.profile)

    print(f"machine: {machine_line()}")
    print(
        f"{'case':28} {'tasks':>5} {'pp':>3} {'template':10} {'predicted s':>12} {'measured s':>11} "
        f"{'error':>7} {'busy error per stage':>22}"
    )
    results: list[Accuracy] = []
    classes: list[dict[str, tuple[float, float]]] = []
    for number in range(arguments.cases):
        policy, options = CASES[number % len(CASES)]
        workload = random_workload(arguments.seed + number, steps=arguments.steps, methods=arguments.methods)
        plan = search_plan(workload, model, cluster, costs, policy=policy, options=options)
        with tempfile.TemporaryDirectory() as folder:
            report = run_plan(plan, Path(folder) / "run")
        results.append(compare(plan, report))
        busy = " ".join(f"{error:+.1%}" for error in results[-1].busy)
        print(
            f"{f'{number}: {policy}, seed {arguments.seed + number}':28} {len(plan.tasks):5} "
            f"{plan.parallelism.pp:3} {plan.template:10} {plan.predicted.iteration_s:12.4f} "
            f"{report.median_iteration_s:11.4f} {results[-1].iteration:+7.1%} {busy:>22}",
            flush=True,
        )
        if classified:
            classes.append(class_totals(plan, costs))
    _print_mean("iteration", [abs(result.iteration) for result in results])
    _print_mean("busy time of a stage", [abs(error) for result in results for error in result.busy])
    if classes:
        print(class_line(classes))
        _print_classes(classes)
    else:
        print("classes of operators, whose errors may cancel: not measured")


def _print_mean(what: str, errors: Sequence[float]) -> None:
    print(f"{what}: mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}")


ClassSeconds = dict[str, tuple[float, float]]
"""Predicted and measured seconds of a case, by class."""


@dataclass(frozen=True, slots=True)
class ClassError:
    """A class of operators over all cases, every case counting the same."""

    name: str
    share: float
    """Share of the measured time."""
    part: float
    """Predicted less measured, relative to the measured time of all classes."""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None where nothing was measured."""
        return 1 + self.part / self.share if self.share else None


def class_errors(cases: Sequence[ClassSeconds]) -> list[ClassError]:
    """Error of each class, in the order of :data:`CLASSES`."""
    totals = [sum(measured for _, measured in case.values()) for case in cases]
    return [
        ClassError(
            name,
            sum(case[name][1] / total for case, total in zip(cases, totals, strict=True)) / len(cases),
            sum((case[name][0] - case[name][1]) / total for case, total in zip(cases, totals, strict=True))
            / len(cases),
        )
        for name in CLASSES
    ]


def class_line(cases: Sequence[ClassSeconds]) -> str:
    """What stands beside the mean error: how far classes err, and how much of that cancels in the sum."""
    errors = class_errors(cases)
    ratios = ", ".join(f"{each.name} {each.ratio:.2f}" for each in errors if each.ratio is not None)
    amount, left = sum(abs(each.part) for each in errors), sum(each.part for each in errors)
    return (
        f"classes of operators, predicted / measured: {ratios}; their errors are {amount:.1%} of the time in "
        f"amount, of which {left:+.1%} is left in the sum"
    )


def _print_classes(cases: Sequence[ClassSeconds]) -> None:
    print(
        f"\n{'operators':12} {'share of the time':>18} {'predicted / measured':>21} {'part of the error':>18}"
    )
    for each in class_errors(cases):
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        print(f"{each.name:12} {each.share:18.1%} {ratio:>21} {each.part:+18.1%}")


if __name__ == "__main__":
    main()
