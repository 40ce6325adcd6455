"""How much less memory do 16 tasks need on a shared backbone than as an instance each, and is it predicted?

16 mixed LoRA tasks on two one-thread ranks, pp=2, each plan really executed:

muxtune             its own plan, which goes for speed and fuses what fits the machine
muxtune, a quarter  its own plan where a rank has a quarter of what ``nemo`` needs
nemo, hf-peft       one instance per task: a copy of the backbone for each, all on the same two ranks; they
                    take turns, so that the activations of only one are alive at a time
own processes       one instance per task in processes of its own, all resident at once, as separate jobs are:
                    each of the eight kinds of task is run alone, and its bytes are counted for both copies

The backbone is a Llama with weights drawn from a seed (1024 wide, 8 layers, 356 MiB), because at the width of
``llama-tiny`` activations outweigh everything. Batches are a quarter of those in ``benchmarks.speedup``: in
LLaMA2-7B, too, what a few hundred tokens keep is small beside the weights. Both can be set.

predicted      ``predicted.peak_memory_bytes`` of the plan
counted        ``peak_bytes`` of the run's report: weights, adapters, optimizers, live saved tensors, messages
               and temporaries
process peak   high-water mark of the resident memory that the operating system saw
empty          process peak of the same policy's run on a backbone 128 wide, less the bytes counted there:
               Python, torch, transformers, peft, plan, data, and what measuring takes
beyond empty   process peak less empty: what the backbone and its tasks take from the machine

Plans are searched with rough costs (``benchmarks.helpers.backbones``), so they are the same on every machine;
no byte depends on costs.

    python -m benchmarks.instances_memory [--steps 2] [--hidden 1024] [--layers 8] [--batches-divided-by 4]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.helpers.backbones import llama_of_width, many_mixed_tasks, rough_costs
from benchmarks.helpers.machine import machine_line
from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.model import ModelSpec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.support.tables import format_table, show_bytes, show_difference, show_rate
from muxtune.tasks import Workload
from runtime import RunOptions, RunReport, run_plan

RATIO_BAR = 4.0
ERROR_BAR = 0.05

POLICIES = ("nemo", "hf-peft", "muxtune")
LIMITED = "muxtune, a quarter"
ALONE = "own processes"

_COPIES = 2
"""Copies of the eight mixed tasks."""

_QUARTER = 4

_THIN = (128, 2)
"""Width and layers of a backbone that takes next to nothing."""


@dataclass(frozen=True, slots=True)
class RankBytes:
    """One rank of one case."""

    predicted: int
    counted: int
    process_peak: int
    empty: int

    @property
    def beyond_empty(self) -> int:
        """What backbone and tasks take from the machine."""
        return self.process_peak - self.empty

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the counted bytes."""
        return self.predicted / self.counted - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What the ranks of a run took."""

    ranks: tuple[RankBytes, ...]
    description: str


def plan_cases(workload: Workload, model: ModelSpec) -> dict[str, Plan]:
    """The plans to compare, on two ranks of this machine."""
    cluster = load_cluster("cpu-2")
    plans = {policy: _plan(workload, model, cluster, policy) for policy in POLICIES}
    quarter = max(plans["nemo"].predicted.peak_memory_bytes) // _QUARTER
    plans[LIMITED] = _plan(workload, model, with_memory(cluster, quarter), "muxtune")
    return plans


def with_memory(cluster: ClusterSpec, memory_bytes: int) -> ClusterSpec:
    """This cluster with so much memory per rank."""
    device = cluster.device.model_copy(update={"memory_bytes": memory_bytes})
    return cluster.model_copy(update={"device": device})


def empty_bytes(workload: Workload, policy: str, *, steps: int) -> list[int]:
    """What a rank's process takes besides tensors, in a run of a policy's plan for a very narrow backbone."""
    plan = _plan(workload, llama_of_width(*_THIN), load_cluster("cpu-2"), policy)
    report = _run(plan, steps=steps)
    return [memory.process_peak_bytes - memory.peak_bytes for memory in report.memory]


def execute(plan: Plan, empty: Sequence[int], *, steps: int) -> Executed:
    """Run a plan.

    Args:
        plan: Plan to measure.
        empty: Bytes that each rank's process takes besides tensors, see :func:`empty_bytes`.
        steps: Iterations; all micro-batches are counted.
    """
    report = _run(plan, steps=steps)
    memory = zip(plan.predicted.peak_memory_bytes, report.memory, empty, strict=True)
    return Executed(
        ranks=tuple(
            RankBytes(predicted, held.peak_bytes, held.process_peak_bytes, empty_process)
            for predicted, held, empty_process in memory
        ),
        description=f"{_describe(plan)}; about {show_rate(report.effective_tokens_per_s)} effective tokens/s",
    )


def execute_alone(workload: Workload, model: ModelSpec, empty: Sequence[int], *, steps: int) -> Executed:
    """Run a task of every kind by itself and add up what the processes of all tasks take."""
    kinds = len(workload.tasks) // _COPIES
    plans = (
        _plan(workload.model_copy(update={"tasks": (task,)}), model, load_cluster("cpu-2"), "nemo")
        for task in workload.tasks[:kinds]
    )
    alone = [execute(plan, empty, steps=steps) for plan in plans]
    return Executed(
        ranks=tuple(
            RankBytes(
                predicted=_COPIES * sum(rank.predicted for rank in same),
                counted=_COPIES * sum(rank.counted for rank in same),
                process_peak=_COPIES * sum(rank.process_peak for rank in same),
                empty=_COPIES * sum(rank.empty for rank in same),
            )
            for same in zip(*(each.ranks for each in alone), strict=True)
        ),
        description=f"{kinds} runs of one task each",
    )


def rank_table(executed: dict[str, Executed]) -> str:
    """Predicted, counted and seen, per rank."""
    header = ["case", "rank", "predicted", "counted", "error", "process peak", "empty", "beyond empty"]
    rows = [
        [
            case,
            str(number),
            show_bytes(rank.predicted),
            show_bytes(rank.counted),
            show_difference(rank.predicted, rank.counted),
            show_bytes(rank.process_peak),
            show_bytes(rank.empty),
            show_bytes(rank.beyond_empty),
        ]
        for case, each in executed.items()
        for number, rank in enumerate(each.ranks)
    ]
    return format_table(header, rows)


_COLUMNS: dict[str, Callable[[RankBytes], int]] = {
    "predicted": lambda rank: rank.predicted,
    "counted": lambda rank: rank.counted,
    "process beyond empty": lambda rank: rank.beyond_empty,
    "whole process": lambda rank: rank.process_peak,
}


def ratio_table(executed: dict[str, Executed]) -> str:
    """Fullest rank with an instance per task over fullest rank with a shared backbone."""
    rows = [
        [instances, shared, *(f"{_ratio(executed, instances, shared, name):.2f}x" for name in _COLUMNS)]
        for instances in ("nemo", "hf-peft", ALONE)
        for shared in ("muxtune", LIMITED)
    ]
    return format_table(["instances", "shared", *_COLUMNS], rows)


def _ratio(executed: dict[str, Executed], instances: str, shared: str, column: str) -> float:
    fullest = [max(map(_COLUMNS[column], executed[case].ranks)) for case in (instances, shared)]
    return fullest[0] / fullest[1]


def _run(plan: Plan, *, steps: int) -> RunReport:
    with tempfile.TemporaryDirectory() as folder:
        # A limit on memory was for the planner; here it would only be a second check.
        roomy = plan.with_decisions(cluster=load_cluster("cpu-2"))
        return run_plan(roomy, Path(folder) / "run", RunOptions(steps=steps, metered_steps=steps))


def _plan(workload: Workload, model: ModelSpec, cluster: ClusterSpec, policy: str) -> Plan:
    options = PlanOptions(pp=2)
    return plan_workload(workload, model, cluster, rough_costs(model), policy=policy, options=options)[0]


def _describe(plan: Plan) -> str:
    tokens = [htask.tokens_per_microbatch for htask in plan.htasks]
    return f"{len(tokens)} hTasks of {min(tokens)} to {max(tokens)} tokens per micro-batch, {plan.template}"


def _verdict(executed: dict[str, Executed]) -> str:
    ratios = [_ratio(executed, "nemo", LIMITED, name) for name in ("counted", "process beyond empty")]
    error = max(abs(rank.error) for each in executed.values() for rank in each.ranks)
    return (
        f"nemo over muxtune with a quarter of its memory: {ratios[0]:.2f}x counted, {ratios[1]:.2f}x of the "
        f"process (bar {RATIO_BAR:g}x); largest error of a prediction {error:.1%} (bar {ERROR_BAR:.0%})"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches-divided-by", type=int, default=4)
    arguments = parser.parse_args()

    steps, divisor = arguments.steps, arguments.batches_divided_by
    model = llama_of_width(arguments.hidden, arguments.layers)
    workload = many_mixed_tasks(_COPIES, steps=steps, batches_divided_by=divisor)
    plans = plan_cases(workload, model)
    empty = {policy: empty_bytes(workload, policy, steps=steps) for policy in POLICIES}
    executed = {case: execute(plan, empty[plan.policy], steps=steps) for case, plan in plans.items()}
    executed[ALONE] = execute_alone(workload, model, empty["nemo"], steps=steps)

    print(f"machine: {machine_line()}")
    print(
        f"{len(workload.tasks)} mixed tasks, {steps} steps, batches of benchmarks.speedup / {divisor}, pp=2"
    )
    print(f"{model.name}, {show_bytes(model.parameters * model.dtype_bytes)} of weights")
    for case, each in executed.items():
        print(f"{case}: {each.description}")
    print(rank_table(executed))
    print(ratio_table(executed))
    print(_verdict(executed))


if __name__ == "__main__":
    main()
