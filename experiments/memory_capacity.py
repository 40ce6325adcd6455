"""How many tasks fit on A40s, with an instance per task and on a shared backbone (the paper's figure 17)?

For a grid of settings that the paper leaves open, on the memory model alone: no task is executed, nothing is
fitted to the paper. Prints the paper's values beside ours.

    python -m experiments.memory_capacity [--json]

Assumptions, stated because the paper does not:

* An instance per task means processes of their own that are all resident and train at the same time, each
  with its bfloat16 weights, its activations and a CUDA context (``processes``); or, at best, one process
  whose instances take turns, so that the activations of one are alive at a time (``turns``).
* Shared means one process and one backbone; the tasks take turns (``shared``) or run fused in one micro-batch
  that is as many times as long (``fused``).
* LoRA of rank 16 on queries, keys and values (GPT) or on queries and values (Llama), float32 beside the
  bfloat16 backbone as in PEFT, AdamW; no recomputation; flash attention; tied embeddings are held once.
* Logits of every token in float32, as transformers and NeMo compute them, or of the targets only, as our
  runtime does: the last 2 tokens of each sequence.
* Four micro-batches per step; sequences padded to the declared length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Literal

from muxtune.batches import row_slots
from muxtune.cluster import GPU_RESERVE_BYTES, GPUS
from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import (
    CUDA_ALLOCATOR_FRACTION,
    Sharding,
    StageLoad,
    backbone_bytes,
    htask_load,
    table_bytes,
)
from muxtune.model import PRESETS, ModelSpec
from muxtune.peft.lora import LoraSpec
from muxtune.schedule import build_schedule
from muxtune.support.tables import format_table

__all__ = ["PAPER", "Capacity", "CapacitySetting", "capacity", "capacity_table", "most_that_fit", "settings"]

PAPER: dict[str, dict[str, float]] = {
    "gpt3-2.7b": {"baseline_out_of_memory_at": 15, "muxtune_fits": 32, "reduction": 4.67},
    "llama2-7b": {"reduction": 3.57},
}
"""Figure 17 of Xue et al., NSDI'26 (arXiv 2603.02885): GPT3-2.7B on 2 A40s, LLaMA2-7B on 4."""

CONTEXT_BYTES = 512 * 2**20
"""Memory of each process on a GPU: CUDA context and loaded kernels with torch. An order of magnitude."""

LENGTHS = {"SST2": 64, "OpenBookQA": 128, "RTE": 256}
MICRO_BATCHES = (2, 4, 8)
MICROBATCHES_PER_STEP = 4
TARGETS_PER_SEQUENCE = 2
RANK = 16
PAPER_TASKS = 32
MOST_TASKS = 4096
"""Number of tasks at which counting ends."""

Placement = Literal["processes", "turns", "shared", "fused"]
Logits = Literal["all", "targets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacitySetting:
    """One point of the grid."""

    model: str
    tp: int
    pp: int
    dataset: str
    length: int
    micro_batch: int
    logits: Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What fits in one setting; bytes are those of the fullest GPU."""

    setting: CapacitySetting
    fits: dict[Placement, int]
    """Most tasks that fit."""
    task_bytes: dict[Placement, int]
    """Bytes that the second task adds to the first."""
    reduction: dict[str, float]
    """Memory of ``processes`` over that of ``shared`` and ``fused``, with as many tasks as ``processes`` fit
    (``... at capacity``) and with as many as the paper runs (``... at 32``)."""


def settings(model: str) -> Iterator[CapacitySetting]:
    """The grid for a model of figure 17, with the parallelism that the paper names."""
    tp, pp = {"gpt3-2.7b": (2, 1), "llama2-7b": (1, 4)}[model]
    for dataset, length in LENGTHS.items():
        for micro_batch in MICRO_BATCHES:
            for logits in ("all", "targets"):
                yield CapacitySetting(
                    model=model,
                    tp=tp,
                    pp=pp,
                    dataset=dataset,
                    length=length,
                    micro_batch=micro_batch,
                    logits=logits,
                )


def capacity(setting: CapacitySetting, *, device_bytes: int | None = None) -> Capacity:
    """Count how many tasks fit.

    Args:
        setting: Setting to count in.
        device_bytes: Memory of each GPU, all of it; the A40's by default.
    """
    limit = GPUS["a40"].memory_bytes + GPU_RESERVE_BYTES if device_bytes is None else device_bytes
    placements: tuple[Placement, ...] = ("processes", "turns", "shared", "fused")

    def needed(placement: Placement) -> Callable[[int], int]:
        return lambda tasks: placement_bytes(setting, placement, tasks)

    fits = {each: most_that_fit(needed(each), limit) for each in placements}
    reduction = {}
    for name, tasks in (("capacity", max(fits["processes"], 1)), (str(PAPER_TASKS), PAPER_TASKS)):
        for each in ("shared", "fused"):
            ours = placement_bytes(setting, each, tasks)
            reduction[f"{each} at {name}"] = needed("processes")(tasks) / ours
    return Capacity(
        setting=setting,
        fits=fits,
        task_bytes={each: needed(each)(2) - needed(each)(1) for each in placements},
        reduction=reduction,
    )


def most_that_fit(needed_bytes: Callable[[int], int], limit_bytes: int, most: int = MOST_TASKS) -> int:
    """Largest number of tasks, up to ``most``, whose bytes stay within a limit; they grow with the number."""
    fit, too_many = 0, 1
    while too_many <= most and needed_bytes(too_many) <= limit_bytes:
        fit, too_many = too_many, 2 * too_many
    too_many = min(too_many, most + 1)
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if needed_bytes(middle) <= limit_bytes:
            fit = middle
        else:
            too_many = middle
    return fit


def placement_bytes(setting: CapacitySetting, placement: Placement, tasks: int) -> int:
    """Bytes on the fullest GPU with so many tasks."""
    if placement == "processes":
        return tasks * _process_bytes(setting, htasks=1, fused=1, instances=1)
    if placement == "turns":
        return _process_bytes(setting, htasks=tasks, fused=1, instances=tasks)
    if placement == "shared":
        return _process_bytes(setting, htasks=tasks, fused=1, instances=1)
    return _process_bytes(setting, htasks=1, fused=tasks, instances=1)


@cache
def _process_bytes(setting: CapacitySetting, *, htasks: int, fused: int, instances: int) -> int:
    """One process on the fullest GPU, with equal hTasks of ``fused`` tasks each."""
    model, sharding = PRESETS[setting.model], Sharding(tp=setting.tp)
    layers, rest = divmod(model.layers, setting.pp)
    assert not rest, "the settings of the paper divide the layers evenly"
    # Equal hTasks: more of them than can be in flight change nothing but what is held all the time.
    shown = min(htasks, setting.pp + 2)
    schedule = build_schedule(
        [[h] for h in range(shown)],
        [MICROBATCHES_PER_STEP] * shown,
        pp=setting.pp,
        template="flush",
        steps=[1] * shown,
        instances=list(range(shown)) if instances > 1 else None,
    )
    most = 0
    for stage, actions in enumerate(schedule):
        first, last = stage == 0, stage == setting.pp - 1
        load = htask_load(
            model,
            layers,
            first=first,
            last=last,
            works=(_work(model, setting, fused),),
            sharding=sharding,
            device="cuda",
        )
        weights = backbone_bytes(model, layers, first=first, last=last, sharding=sharding)
        if first and last and model.tied_embeddings:
            weights -= sharding.vocab_rows(model) * model.hidden * model.dtype_bytes
        held = StageLoad(
            first=first,
            last=last,
            in_flight=setting.pp - stage,
            backbone_bytes=instances * weights,
            table_bytes=instances * table_bytes(model),
            htasks=(load,) * htasks,
        )
        peak = held.peak(actions).with_allocator(CUDA_ALLOCATOR_FRACTION)
        most = max(most, peak.total_bytes + CONTEXT_BYTES)
    return most


def _work(model: ModelSpec, setting: CapacitySetting, fused: int) -> MicrobatchWork:
    targets = ("c_attn",) if model.family == "gpt2" else ("q_proj", "v_proj")
    lora = LoraSpec(method="lora", r=RANK, alpha=2 * RANK, targets=targets)
    tokens = setting.micro_batch * setting.length
    per_sequence = setting.length if setting.logits == "all" else TARGETS_PER_SEQUENCE
    return MicrobatchWork(
        tokens=fused * tokens,
        task_tokens=(tokens,) * fused,
        pefts=(lora,) * fused,
        attention=((1.0, fused * setting.micro_batch, row_slots(setting.length)),),
        targets=float(fused * setting.micro_batch * per_sequence),
    )


def capacity_table(results: Sequence[Capacity]) -> str:
    """One row per setting."""
    header = [
        "model",
        "dataset",
        "micro-batch",
        "logits",
        "processes fit",
        "turns fit",
        "shared fit",
        "fused fit",
        "MiB per task: processes",
        "shared",
        "fused",
        "reduction at capacity: shared",
        "fused",
        f"at {PAPER_TASKS}: shared",
        "fused",
    ]
    return format_table(header, [_row(result) for result in results])


def _row(result: Capacity) -> list[str]:
    s, fits, bytes_ = result.setting, result.fits, result.task_bytes
    return [
        s.model,
        f"{s.dataset} ({s.length})",
        str(s.micro_batch),
        s.logits,
        *(_count(fits[each]) for each in ("processes", "turns", "shared", "fused")),
        *(f"{bytes_[each] / 2**20:.0f}" for each in ("processes", "shared", "fused")),
        *(f"{ratio:.2f}" for ratio in result.reduction.values()),
    ]


def _count(tasks: int) -> str:
    return f"{tasks}" if tasks < MOST_TASKS else f"{tasks}+"


_WHY = """\
Where ours differs: processes and turns are the two ends of what an instance can cost beyond its weights (own
activations and context for each, or for one at a time). A task that takes turns on the shared backbone adds
its adapter and AdamW's moments alone, so a thousand fit and the reduction grows with the number of tasks;
fused tasks add their activations too. The paper's values lie between these, as a plan that fuses some tasks
and interleaves others would. Longer sequences and larger micro-batches make activations count for more, and
every ratio smaller."""


def _summary(model: str, results: Sequence[Capacity]) -> list[str]:
    """Ours over the grid beside the paper's values."""
    paper = PAPER[model]
    own = [result for result in results if result.setting.model == model]
    lines = [f"{model}:"]
    out = _spread([result.fits["processes"] + 1 for result in own])
    lines.append(f"  instances run out of memory at task {out}{_beside(paper, 'baseline_out_of_memory_at')}")
    fused = _spread([result.fits["fused"] for result in own])
    lines.append(f"  fused on a shared backbone fit {fused} tasks{_beside(paper, 'muxtune_fits')}")
    for name in own[0].reduction:
        ratios = [result.reduction[name] for result in own]
        lines.append(f"  reduction, {name}: {_spread(ratios, '.2f')}{_beside(paper, 'reduction')}")
    return lines


def _beside(paper: dict[str, float], key: str) -> str:
    return f"; the paper's: {paper[key]:g}" if key in paper else ""


def _spread(values: Sequence[float], form: str = ".0f") -> str:
    return f"{min(values):{form}} to {max(values):{form}} (median {median(values):{form}})"


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args()
    results = [capacity(setting) for model in PAPER for setting in settings(model)]
    if arguments.json:
        print(json.dumps({"paper": PAPER, "capacity": [asdict(result) for result in results]}))
        return
    print(capacity_table(results))
    for model in PAPER:
        print("\n".join(_summary(model, results)))
    print(_WHY)


if __name__ == "__main__":
    main()
