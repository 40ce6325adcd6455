"""How much communication does orchestration hide, and how near to the lower bound do its clocks come?

LLaMA2-7B on A40s (testbed A), the whole model on the ranks of one tensor-parallel group, priced by the
shipped coefficients. Prints every mode on one stated clock, and 100 random clocks against their lower bound.

    python -m experiments.orchestration [--contention 0.1] [--json] [--out clock.png]

The stated clock holds three hTasks (:data:`STATED`). A random clock holds 2 to 4 hTasks; each has 1 to 3
tasks that share 64 to 4096 tokens, a multiple of 64, in equal parts; sequences of 64, 128, 256 or 512 tokens;
and per task a LoRA rank of 4 to 64 on 1 to 7 of the seven linears. All choices are uniform, from the stated
seed; forward and backward and both numbers of ranks see the same clocks.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, CostModel, MicrobatchWork
from muxtune.costs.collectives import interconnect_of
from muxtune.graph import StageGraph, TimedNode, stage_graph, time_graph
from muxtune.graph.operators import PHASES, Phase
from muxtune.model import PRESETS
from muxtune.orchestration import MODES, ClockSchedule, LaunchGraph, Mode, launch_graph, schedule_clock
from muxtune.peft.lora import LoraSpec
from muxtune.support.errors import UserError
from muxtune.support.files import write_atomically
from muxtune.support.tables import format_table, show_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "STATED",
    "ClockRow",
    "RatioRow",
    "draw_clock",
    "orchestration_rows",
    "random_clock",
    "ratio_rows",
]

MODEL = PRESETS["llama2-7b"]
TPS = (2, 4)
CLOCKS = 100
SEED = 20260
_BLOCK_TOKENS = 64
_MOST_BLOCKS = 64
_LENGTHS = (64, 128, 256, 512)
_RANKS = (4, 8, 16, 32, 64)
_TARGETS_PER_SEQUENCE = 2
_DRAWN_LAYERS = 2


def _work(tokens: int, length: int, pefts: Sequence[LoraSpec]) -> MicrobatchWork:
    """An hTask's micro-batch of equal sequences; tasks have equal parts, but for the last."""
    share = tokens // len(pefts)
    shares = (*[share] * (len(pefts) - 1), tokens - share * (len(pefts) - 1))
    sequences = tokens // length
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=shares,
        pefts=tuple(pefts),
        attention=((1.0, sequences, length),),
        targets=float(_TARGETS_PER_SEQUENCE * sequences),
    )


def _lora(r: int, *targets: str) -> LoraSpec:
    return LoraSpec(method="lora", r=r, alpha=2 * r, targets=targets)


STATED = (
    _work(512, 128, [_lora(16, "q_proj", "v_proj")] * 2),
    _work(1024, 256, [_lora(16, "all-linear")]),
    _work(1024, 64, [_lora(8, "q_proj", "k_proj", "v_proj", "o_proj"), _lora(32, "q_proj", "v_proj")]),
)
"""512 tokens of two tasks with rank 16 on queries and values; 1024 of one task with rank 16 on every linear;
1024 of two tasks, with rank 8 on attention's linears and rank 32 on queries and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockRow:
    """The stated clock in one mode."""

    tp: int
    phase: Phase
    mode: Mode
    clock_s: float
    communication_s: float
    exposed_communication_s: float
    lower_bound_s: float
    """Lower bound, which is the same for all modes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioRow:
    """Random clocks in one mode: seconds over their lower bound."""

    tp: int
    phase: Phase
    mode: Mode
    clocks: int
    median: float
    mean: float
    worst: float
    operator_median: float
    """Median over the weaker bound whose path counts single operators, as if none shared a stream."""


def a40_costs() -> CostModel:
    """Costs of the whole model on testbed A."""
    return AnalyticCosts("a40", MODEL, interconnect_of(load_cluster("testbed-a")))


def htask_graph(
    costs: CostModel, work: MicrobatchWork, phase: Phase, tp: int, layers: int = MODEL.layers
) -> StageGraph[TimedNode]:
    """Operators of an hTask where a tensor-parallel group holds the whole model."""
    graph = stage_graph(MODEL, layers, first=True, last=True, work=work, phase=phase, tp=tp)
    return time_graph(graph, costs, phase)


def orchestration_rows(costs: CostModel, contention: float = 0.0) -> Iterator[ClockRow]:
    """The stated clock in every mode."""
    for tp in TPS:
        for phase in PHASES:
            graphs = [launch_graph(htask_graph(costs, work, phase, tp)) for work in STATED]
            for mode in MODES:
                schedule = schedule_clock(graphs, mode, contention)
                yield ClockRow(
                    tp=tp,
                    phase=phase,
                    mode=mode,
                    clock_s=schedule.seconds,
                    communication_s=schedule.bounds.communication_s,
                    exposed_communication_s=schedule.exposed_communication_s,
                    lower_bound_s=schedule.lower_bound_s,
                )


def random_clock(draw: random.Random) -> list[MicrobatchWork]:
    """HTasks of a random clock, see the top of the file."""
    names = [linear.name.rsplit(".", 1)[-1] for linear in MODEL.linears]
    works = []
    for _ in range(draw.randint(2, 4)):
        tokens = _BLOCK_TOKENS * draw.randint(1, _MOST_BLOCKS)
        length = draw.choice([each for each in _LENGTHS if tokens % each == 0])
        pefts = [
            _lora(draw.choice(_RANKS), *draw.sample(names, draw.randint(1, len(names))))
            for _ in range(draw.randint(1, 3))
        ]
        works.append(_work(tokens, length, pefts))
    return works


def ratio_rows(
    costs: CostModel,
    contention: float = 0.0,
    *,
    clocks: int = CLOCKS,
    seed: int = SEED,
    modes: Sequence[Mode] = MODES,
) -> Iterator[RatioRow]:
    """Random clocks in some modes, the same ones for each number of ranks and phase."""
    draw = random.Random(seed)
    drawn = [random_clock(draw) for _ in range(clocks)]
    for tp in TPS:
        for phase in PHASES:
            timed = [[launch_graph(htask_graph(costs, work, phase, tp)) for work in works] for works in drawn]
            for mode in modes:
                yield _ratio_row(timed, tp, phase, mode, contention)


def _ratio_row(
    timed: Sequence[Sequence[LaunchGraph]], tp: int, phase: Phase, mode: Mode, contention: float
) -> RatioRow:
    schedules = [schedule_clock(graphs, mode, contention) for graphs in timed]
    ratios = [each.seconds / each.lower_bound_s for each in schedules]
    return RatioRow(
        tp=tp,
        phase=phase,
        mode=mode,
        clocks=len(ratios),
        median=median(ratios),
        mean=fmean(ratios),
        worst=max(ratios),
        operator_median=median(each.seconds / each.bounds.operator_lower_s(contention) for each in schedules),
    )


def draw_clock(schedules: Sequence[tuple[str, ClockSchedule]], out: Path) -> None:
    """Draw the two streams of clocks above each other, on one time axis.

    Args:
        schedules: Title and clock, from the top.
        out: PNG, SVG or PDF, by its suffix; whole or absent.

    Raises:
        UserError: Nothing can be written in that format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suffix = out.suffix.removeprefix(".").lower()
    if suffix not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"cannot draw {out}: expected a file name that ends in .png, .svg or .pdf")
    figure = Figure(figsize=(13, 1.9 * len(schedules) + 0.5), layout="constrained")
    panels = figure.subplots(len(schedules), 1, sharex=True, squeeze=False)[:, 0]
    longest_s = max(schedule.seconds for _, schedule in schedules)
    for axes, (title, schedule) in zip(panels, schedules, strict=True):
        _draw_streams(axes, schedule)
        exposed = show_seconds(schedule.exposed_communication_s)
        axes.set_title(
            f"{title}: {show_seconds(schedule.seconds)}, {exposed} of communication exposed",
            loc="left",
            fontsize=10,
            fontweight="bold",
        )
    panels[-1].set_xlim(0, 1.01 * longest_s * 1e3)
    panels[-1].set_xlabel("ms")
    write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=150, format=suffix))


def _draw_streams(axes: Axes, schedule: ClockSchedule) -> None:
    streams = tuple(schedule.launches)
    htasks = sorted({each.htask for found in schedule.launches.values() for each in found})
    for row, stream in enumerate(streams):
        for htask in htasks:
            spans = [
                (each.start_s * 1e3, (each.end_s - each.start_s) * 1e3)
                for each in schedule.launches[stream]
                if each.htask == htask
            ]
            axes.broken_barh(
                spans,
                (row - 0.4, 0.8),
                facecolor=f"C{htask}",
                edgecolor="white",
                linewidth=0.4,
                label=f"hTask {htask}" if row == 0 else None,
            )
    axes.set_yticks(range(len(streams)), streams)
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", ncols=len(htasks), fontsize=8, frameon=False, bbox_to_anchor=(1, 1))


def clock_table(rows: Sequence[ClockRow]) -> str:
    """Table for people."""
    header = ["tp", "phase", "mode", "clock", "communication", "exposed", "of it", "over lower bound"]
    cells = [
        [
            str(row.tp),
            row.phase,
            row.mode,
            show_seconds(row.clock_s),
            show_seconds(row.communication_s),
            show_seconds(row.exposed_communication_s),
            f"{row.exposed_communication_s / row.communication_s:.1%}",
            f"{row.clock_s / row.lower_bound_s - 1:.2%}",
        ]
        for row in rows
    ]
    return format_table(header, cells)


def ratio_table(rows: Sequence[RatioRow]) -> str:
    """Table for people."""
    header = ["tp", "phase", "mode", "clocks", "median", "mean", "worst", "median over operators' bound"]
    cells = [
        [
            str(row.tp),
            row.phase,
            row.mode,
            str(row.clocks),
            *(f"{each:.4f}" for each in (row.median, row.mean, row.worst, row.operator_median)),
        ]
        for row in rows
    ]
    return format_table(header, cells)


def _draw_stated(costs: CostModel, contention: float, out: Path) -> None:
    """A few layers of the stated clock, whose launches can be told apart."""
    graphs = [launch_graph(htask_graph(costs, work, "fwd", TPS[-1], _DRAWN_LAYERS)) for work in STATED]
    schedules = [(mode, schedule_clock(graphs, mode, contention)) for mode in MODES]
    where = f"forward of {_DRAWN_LAYERS} layers at tp={TPS[-1]}"
    shown = {"sequential", "interleaved"}
    draw_clock([(f"{mode}, {where}", each) for mode, each in schedules if mode in shown], out)


def main() -> None:
    """Print both tables, or their rows as JSON."""
    parser = argparse.ArgumentParser(description="Communication that orchestration hides; LLaMA2-7B on A40s.")
    parser.add_argument("--contention", type=float, default=0.0, help="of overlapping kernels, from 0")
    parser.add_argument("--seed", type=int, default=SEED, help="of the random clocks")
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    parser.add_argument("--out", type=Path, help="picture of a clock, sequential above interleaved")
    arguments = parser.parse_args()
    if arguments.contention < 0:
        parser.error(f"--contention {arguments.contention}: expected 0 or more")
    costs = a40_costs()
    rows = list(orchestration_rows(costs, arguments.contention))
    ratios = list(ratio_rows(costs, arguments.contention, seed=arguments.seed))
    if arguments.json:
        print(json.dumps({"clock": [asdict(r) for r in rows], "random": [asdict(r) for r in ratios]}))
    else:
        tokens = ", ".join(str(work.tokens) for work in STATED)
        print(f"hTasks of {tokens} tokens, contention {arguments.contention:g}\n\n{clock_table(rows)}")
        print(f"\n{CLOCKS} random clocks, seed {arguments.seed}: seconds over lower bound\n")
        print(ratio_table(ratios))
    if arguments.out is not None:
        try:
            _draw_stated(costs, arguments.contention, arguments.out)
        except UserError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
