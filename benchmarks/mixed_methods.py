"""What do tasks of many PEFT methods cost beside as many LoRA tasks with the same number of parameters?

Tasks with the same data in one hTask, on all layers of a backbone in this process: once with the methods
dealt in turn, once all LoRA, whose ranks are such that both sides train the same number of parameters; and
once for each method, all tasks with it. Forward and backward of one real micro-batch in processor time, both
sides in turn, the fastest of some rounds, so that what else runs on the machine hardly counts.

    python -m benchmarks.mixed_methods [--tasks 16] [--hidden 256] [--layers 4] [--rounds 7] [--no-alone]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from benchmarks.helpers.backbones import llama_of_width, rough_costs
from benchmarks.helpers.machine import machine_line
from benchmarks.helpers.microbatch_times import measure_microbatches
from experiments.workloads import PROFILES
from muxtune.cluster import load_cluster
from muxtune.model import ModelSpec
from muxtune.peft import EMBEDDING, attachments
from muxtune.plan import Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.support.tables import show_seconds
from muxtune.tasks import workload_from

BAR = 1.15
"""Time of mixed tasks over that of as many LoRA tasks."""

Peft = Mapping[str, object]

_SOME = ["q_proj", "v_proj", "down_proj"]

METHODS: dict[str, Peft] = {
    "lora": {"method": "lora", "r": 8, "alpha": 16, "targets": ["all-linear"]},
    "dora": {"method": "lora", "r": 8, "alpha": 16, "targets": _SOME, "use_dora": True},
    "ia3": {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    "shira": {"method": "shira", "r": 8, "targets": _SOME},
    "diff": {"method": "diff", "density": 0.02, "targets": ["all-linear"]},
    "serial bottleneck": {"method": "bottleneck", "size": 16},
    "parallel bottleneck": {"method": "bottleneck", "size": 16, "placement": "parallel", "scale": 4},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 16},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 16},
}
"""Methods with the parameters that their papers and libraries suggest, for backbones without biases."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions in turn; the fastest counts")
    parser.add_argument(
        "--only", choices=METHODS, action="append", help="these methods alone; may be repeated"
    )
    either = argparse.BooleanOptionalAction
    parser.add_argument("--alone", action=either, default=True, help="each method alone, too")
    arguments = parser.parse_args()

    model = llama_of_width(arguments.hidden, arguments.layers)
    print(f"machine: {machine_line()}")
    print(f"{arguments.tasks} tasks in one hTask, {model.name}, fastest of {arguments.rounds}\n")
    chosen = arguments.only or list(METHODS)
    sides = {"mixed": chosen}
    if arguments.alone:
        sides |= {name: [name] for name in chosen}
    print(_line("tasks", "parameters", "LoRA's", "time", "LoRA's", "forward", "backward", "both"))
    for name, methods in sides.items():
        pefts = [METHODS[method] for method in islice(cycle(methods), arguments.tasks)]
        parameters = sum(trained_parameters(peft, model) for peft in pefts)
        loras = loras_with(parameters, arguments.tasks, model)
        theirs = sum(trained_parameters(peft, model) for peft in loras)
        times = measure_microbatches([_plan(side, model) for side in (pefts, loras)], arguments.rounds)
        ratios = [f"{mixed / lora:.2f}" for mixed, lora in zip(*times, strict=True)]
        whole = f"{sum(times[0]) / sum(times[1]):.2f}"
        seconds = map(show_seconds, map(sum, times))
        print(_line(name, str(parameters), str(theirs), *seconds, *ratios, whole), flush=True)
    print(f"\nbar: mixed tasks take at most {BAR} times what LoRA tasks take")


def _line(*cells: str) -> str:
    return "  ".join([f"{cells[0]:20}", *(f"{cell:>10}" for cell in cells[1:])])


def trained_parameters(peft: Peft, model: ModelSpec) -> int:
    """Parameters that a task trains."""
    (task,) = workload_from({"tasks": [_task(0, peft)]}, "tasks", Path()).tasks
    layers = (EMBEDDING, *range(model.layers))
    return sum(each.parameters for layer in layers for each in attachments(task.peft, model, layer))


def loras_with(parameters: int, tasks: int, model: ModelSpec) -> list[Peft]:
    """LoRA tasks that train so many parameters together: ranks differ by one at most, none is below one."""
    of_rank = trained_parameters(_lora(1), model)
    ranks = max(round(parameters / of_rank), tasks)
    return [_lora(ranks // tasks + (i < ranks % tasks)) for i in range(tasks)]


def _lora(r: int) -> Peft:
    return {"method": "lora", "r": r, "alpha": 2 * r, "targets": ["all-linear"]}


def _plan(pefts: Sequence[Peft], model: ModelSpec) -> Plan:
    tasks = [_task(number, peft) for number, peft in enumerate(pefts)]
    workload = workload_from({"tasks": tasks}, "tasks", Path())
    options = PlanOptions(
        pp=1, tp=1, dp=1, partition="+".join(task.id for task in workload.tasks), alignment="pack"
    )
    return plan_workload(
        workload, model, load_cluster("cpu-1"), rough_costs(model), policy="muxtune", options=options
    )[0]


def _task(number: int, peft: Peft) -> dict[str, object]:
    histogram = list(PROFILES)[number % len(PROFILES)]
    return {
        "id": f"t{number}",
        "peft": dict(peft),
        "dataset": {"lengths": histogram},
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": PROFILES[histogram],
        "learning_rate": 1e-3,
        "steps": 2,
        "seed": number,
    }


if __name__ == "__main__":
    main()
