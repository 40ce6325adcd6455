"""Is the memory of a stage predicted that the runtime really holds?

Plans workloads of mixed ranks, targets and lengths, executes each plan twice and prints, per stage:

predicted   the plan's ``predicted.peak_memory_bytes`` and what it is made of
counted     ``peak_bytes`` of the run's report, with every micro-batch counted: weights, adapters, optimizers,
            live saved tensors over the schedule, messages and temporaries
allocated   most bytes that torch's allocator had given out at once while the actions were played

    python -m benchmarks.memory [--steps 3] [--case N]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.helpers.machine import machine_line
from benchmarks.helpers.memory_trace import traced_peaks
from muxtune.cluster import load_cluster
from muxtune.costs import CostModel
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import Operator, Phase
from muxtune.memory import StageMemory
from muxtune.model import Dtype, load_model_spec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.exact.bytes import plan_memory
from muxtune.policies import plan_workload
from muxtune.support.tables import format_table, show_bytes, show_difference
from muxtune.tasks import Workload, workload_from
from runtime import RunOptions, run_plan
from runtime.reports.footprint import MeasuredMemory

Row = tuple[str, int, tuple[str, ...], int, int]
"""Length histogram, rank, targets, global batch, micro-batch."""

_LENGTHS = {"sst2": 64, "openbookqa": 128, "rte": 256}


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """Decisions for one plan."""

    model: str
    policy: str
    options: PlanOptions
    dtype: Dtype = "float32"
    tasks: int = 6

    def __str__(self) -> str:
        fixed = [self.options.alignment, self.options.template, f"pp {self.options.pp}"]
        parts = [self.model, self.policy, *(each for each in fixed if each), self.dtype]
        return ", ".join(part for part in parts if part != "float32")


CASES = (
    MemoryCase("llama-tiny", "muxtune", PlanOptions(alignment="pack", template="continuous", pp=2)),
    MemoryCase("llama-tiny", "muxtune", PlanOptions(alignment="chunk", template="flush", pp=1)),
    MemoryCase("llama-tiny", "nemo", PlanOptions(alignment="pad", template="flush", pp=2)),
    MemoryCase("llama-tiny", "sl-peft", PlanOptions(alignment="pad", template="flush", pp=2)),
    MemoryCase("gpt2-tiny", "muxtune", PlanOptions(alignment="chunk", template="continuous", pp=2)),
    MemoryCase("gpt2-tiny", "temporal-only", PlanOptions(alignment="pack", template="flush", pp=1)),
    MemoryCase("gpt2-tiny", "nemo", PlanOptions(alignment="pad", template="flush", pp=1), tasks=4),
    MemoryCase("gpt2-tiny", "sl-peft", PlanOptions(alignment="pad", template="continuous", pp=2)),
    MemoryCase("opt-tiny", "muxtune", PlanOptions(alignment="pack", template="continuous", pp=2)),
    MemoryCase("llama-tiny", "temporal-only", PlanOptions(alignment="pack", pp=2), dtype="bfloat16", tasks=4),
)


class AnyCosts(CostModel):
    """Costs that only rank plans: no byte depends on them."""

    ref = CostsRef(profile_id="any", device="any", digest="0")

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """A launch, and a rate for the last dimension."""
        return 50e-6 + op.dims[-1] * 1e-6

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """No cost of an action's own."""
        return operators_s

    def shard(self, tp: int) -> AnyCosts:
        """These costs, whatever the width of operators."""
        return self

    def exploring(self) -> AbstractContextManager[None]:
        """Nothing to warn of."""
        return nullcontext()


def case_workload(case: MemoryCase, *, steps: int) -> Workload:
    """Tasks of different length, rank, targets and batch."""
    attention, mlp = {
        "llama-tiny": (("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")),
        "gpt2-tiny": (("c_attn",), ("c_fc",)),
        "opt-tiny": (("q_proj", "v_proj"), ("fc1", "fc2")),
    }[case.model]
    rows: tuple[Row, ...] = (
        ("sst2", 4, attention, 8, 8),
        ("rte", 16, mlp, 4, 2),
        ("openbookqa", 8, ("all-linear",), 8, 4),
        ("sst2", 64, attention, 16, 8),
        ("openbookqa", 1, attention, 4, 4),
        ("rte", 32, ("all-linear",), 8, 4),
    )
    tasks = [
        {
            "id": f"{lengths}-{number}",
            "peft": {"method": "lora", "r": r, "alpha": 2 * r, "targets": targets},
            "dataset": {"lengths": lengths},
            "global_batch_size": batch,
            "micro_batch_size": micro_batch,
            "max_length": _LENGTHS[lengths],
            "learning_rate": 1e-3,
            "steps": steps,
            "seed": number,
        }
        for number, (lengths, r, targets, batch, micro_batch) in enumerate(rows[: case.tasks])
    ]
    return workload_from({"backbone": case.model, "tasks": tasks}, "generated workload", Path())


def plan_case(case: MemoryCase, *, steps: int) -> Plan:
    """The plan of a case, on as many ranks as it has stages."""
    model = load_model_spec(case.model, case.dtype)
    cluster = load_cluster(f"cpu-{case.options.pp}")
    workload = case_workload(case, steps=steps)
    return plan_workload(workload, model, cluster, AnyCosts(), policy=case.policy, options=case.options)[0]


def count_case(plan: Plan, *, steps: int) -> tuple[MeasuredMemory, ...]:
    """What the report of a real run counts, per stage."""
    with tempfile.TemporaryDirectory() as folder:
        return run_plan(plan, Path(folder) / "run", RunOptions(steps=steps, metered_steps=steps)).memory


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", type=int, help="only this one")
    arguments = parser.parse_args()

    print(f"machine: {machine_line()}")
    numbers = range(len(CASES)) if arguments.case is None else [arguments.case]
    rows: list[list[str]] = []
    errors: list[float] = []
    real: list[float] = []
    for number in numbers:
        case = CASES[number]
        plan = plan_case(case, steps=arguments.steps)
        counted = count_case(plan, steps=arguments.steps)
        allocated = traced_peaks(plan, steps=arguments.steps)
        for stage, predicted in enumerate(plan_memory(plan)):
            assert predicted.total_bytes == plan.predicted.peak_memory_bytes[stage]
            rows.append(_row(f"{number}: {case}", stage, predicted, counted[stage], allocated[stage]))
            errors.append(predicted.total_bytes / counted[stage].peak_bytes - 1)
            real.append(predicted.total_bytes / allocated[stage] - 1)
    print(format_table(_HEADER, rows))
    for name, each in (("counted", errors), ("allocated", real)):
        print(f"against {name}: {_summary(each)}")


_HEADER = [
    "case",
    "stage",
    "predicted",
    "counted",
    "error",
    "allocated",
    "error",
    "weights",
    "adapters",
    "activations",
    "(counted)",
    "messages",
    "(counted)",
    "temporaries",
]


def _row(name: str, stage: int, p: StageMemory, counted: MeasuredMemory, allocated: int) -> list[str]:
    return [
        name,
        str(stage),
        show_bytes(p.total_bytes),
        show_bytes(counted.peak_bytes),
        show_difference(p.total_bytes, counted.peak_bytes),
        show_bytes(allocated),
        show_difference(p.total_bytes, allocated),
        show_bytes(p.backbone_bytes + p.table_bytes),
        show_bytes(p.adapter_bytes + p.optimizer_bytes + p.gradient_bytes),
        show_bytes(p.activation_bytes + p.logit_bytes),
        show_bytes(counted.activation_peak_bytes),
        show_bytes(p.message_bytes),
        show_bytes(counted.message_peak_bytes),
        show_bytes(p.workspace_bytes),
    ]


def _summary(errors: Sequence[float]) -> str:
    absolute = [abs(error) for error in errors]
    return (
        f"{len(absolute)} stages, mean error {sum(absolute) / len(absolute):.2%}, largest {max(absolute):.2%}"
    )


if __name__ == "__main__":
    main()
