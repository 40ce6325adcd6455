"""Workloads for measurements: mixed tasks with the length profiles of the paper's datasets."""

from __future__ import annotations

from pathlib import Path
from random import Random

from muxtune.tasks import Workload, workload_from

PROFILES = {"sst2": 64, "openbookqa": 128, "rte": 256}
"""Length histogram and the length that a tenant declares for it (paper, section 5.1)."""

_TARGETS = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["all-linear"],
)


_SOME = ["q_proj", "v_proj", "down_proj"]

METHODS: tuple[dict[str, object], ...] = (
    {"method": "lora", "r": 8, "alpha": 16, "targets": _SOME, "use_dora": True},
    {"method": "lora", "r": 8, "alpha": 16, "targets": _SOME, "dropout": 0.1},
    {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    {"method": "shira", "r": 8, "targets": _SOME},
    {"method": "diff", "density": 0.02, "targets": ["all-linear"]},
    {"method": "bottleneck", "size": 32},
    {"method": "bottleneck", "size": 32, "placement": "parallel", "scale": 4},
    {"method": "prefix_tuning", "num_virtual_tokens": 16},
    {"method": "prompt_tuning", "num_virtual_tokens": 16},
)
"""Methods and variants beside plain LoRA, for backbones without biases."""


def mixed_workload(steps: int = 12) -> Workload:
    """Eight tasks of different length, rank, batch and targets; what the speed comparisons run."""
    rows = [
        # histogram, r, targets, global batch, micro-batch
        ("sst2", 8, 0, 16, 8),
        ("openbookqa", 8, 0, 8, 4),
        ("rte", 16, 1, 8, 4),
        ("sst2", 4, 3, 8, 8),
        ("openbookqa", 16, 2, 8, 8),
        ("rte", 8, 0, 4, 4),
        ("sst2", 32, 1, 32, 16),
        ("openbookqa", 8, 3, 16, 8),
    ]
    return _workload([_task(i, *row, steps=steps) for i, row in enumerate(rows)])


def random_workload(
    seed: int, *, steps: int = 10, tasks: int | None = None, methods: bool = False
) -> Workload:
    """A workload drawn from ``seed``: 2 to 8 tasks, or the number given.

    Args:
        seed: Seed.
        steps: Steps of each task.
        tasks: Number of tasks.
        methods: Whether two of three tasks have another method than LoRA, all of them in turn from seed to
            seed.
    """
    random = Random(seed)
    rows = []
    for i in range(tasks or random.randint(2, 8)):
        micro_batch = random.choice((2, 4, 8))
        row = (
            random.choice(list(PROFILES)),
            random.choice((4, 8, 16, 32)),
            random.randrange(len(_TARGETS)),
            micro_batch * random.choice((1, 2, 4)),
            micro_batch,
        )
        rows.append(_task(i, *row, steps=steps))
        if methods and i % 3:
            rows[-1]["peft"] = METHODS[(5 * seed + 2 * (i // 3) + i % 3) % len(METHODS)]
    return _workload(rows)


def _task(
    number: int, histogram: str, r: int, targets: int, global_batch: int, micro_batch: int, *, steps: int
) -> dict[str, object]:
    return {
        "id": f"{histogram}-{number}",
        "peft": {"method": "lora", "r": r, "alpha": 2 * r, "targets": _TARGETS[targets]},
        "dataset": {"lengths": histogram},
        "global_batch_size": global_batch,
        "micro_batch_size": micro_batch,
        "max_length": PROFILES[histogram],
        "learning_rate": 1e-3,
        "steps": steps,
        "seed": number,
    }


def _workload(tasks: list[dict[str, object]]) -> Workload:
    return workload_from({"backbone": "llama-tiny", "tasks": tasks}, "generated workload", Path())
