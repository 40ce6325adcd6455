"""How long does it take to schedule a clock? A search prices hundreds of them.

    python -m benchmarks.orchestration [--repetitions 20]

LLaMA2-7B, all layers on four A40s, one task with LoRA on every linear per hTask. Processor time, medians and
the slowest; graphs have a shape that was cut before, as in a search.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from statistics import median
from time import process_time

from experiments.orchestration import a40_costs, htask_graph
from muxtune.costs import MicrobatchWork
from muxtune.graph import StageGraph, TimedNode
from muxtune.graph.operators import PHASES
from muxtune.orchestration import LaunchGraph, launch_graph, schedule_clock
from muxtune.peft.lora import LoraSpec
from muxtune.support.tables import format_table

HTASKS = (1, 2, 4, 8)
_TP = 4
_LENGTH = 128


def _work(sequences: int) -> MicrobatchWork:
    tokens = sequences * _LENGTH
    lora = LoraSpec(method="lora", r=16, alpha=16, targets=("all-linear",))
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=(tokens,),
        pefts=(lora,),
        attention=((1.0, sequences, _LENGTH),),
        targets=float(sequences),
    )


def _cut_all(timed: Sequence[StageGraph[TimedNode]]) -> list[LaunchGraph]:
    return [launch_graph(graph) for graph in timed]


def _measure(timed: Sequence[StageGraph[TimedNode]], repetitions: int) -> Iterator[tuple[float, float]]:
    """Milliseconds to cut and to schedule; what a graph remembers is asked for anew each time."""
    for _ in range(repetitions):
        start_s = process_time()
        launches = _cut_all(timed)
        cut_s = process_time()
        schedule_clock(launches, "interleaved")
        yield (cut_s - start_s) * 1e3, (process_time() - cut_s) * 1e3


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Processor time to schedule a clock.")
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    costs = a40_costs()
    rows = []
    for phase in PHASES:
        for count in HTASKS:
            timed = [htask_graph(costs, _work(4 + 3 * i), phase, _TP) for i in range(count)]
            nodes = sum(repeats for graph in timed for _, repeats in graph)
            subgraphs = sum(len(each.seconds) for each in _cut_all(timed))
            columns = zip(*_measure(timed, repetitions), strict=True)
            figures = [each(column) for column in columns for each in (median, max)]
            rows.append(
                [phase, str(count), str(nodes), str(subgraphs), *(f"{figure:.2f}" for figure in figures)]
            )
    header = ["phase", "hTasks", "operators", "subgraphs", "cut ms", "slowest", "schedule ms", "slowest"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
