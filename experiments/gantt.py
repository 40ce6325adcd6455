"""Pipeline timelines as a picture: what was simulated above what was measured, on one time axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muxtune.errors import UserError
from muxtune.files import write_atomically
from muxtune.plan import Plan
from muxtune.trace import COMPUTE, Span, iteration_ends_s, load_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Window", "draw_gantt", "draw_plan", "middle_window"]

_SIMULATED_ITERATIONS = 15  # enough beside those in the middle for a run that is slower
_ROW_INCHES = 0.5
_BAR_HEIGHT = 0.82
_CHARACTER_SHARE = 0.0052  # of the axis: bars without room for their label have none
_LEGEND_CHARACTERS = 88
_DASHES = (0, (4, 3))

Shades = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Forward and backward colour of an hTask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a timeline that is drawn; its start becomes zero on the axis."""

    start_s: float
    stop_s: float
    first_iteration: int
    """Iterations that it shows, counted from 0."""
    last_iteration: int


def middle_window(spans: Sequence[Span], iterations: int) -> Window:
    """The middle ``iterations`` iterations, or all where there are no more.

    An iteration begins where the one before it ended. Under the continuous template some work of the
    neighbours falls into it.
    """
    ends_s = iteration_ends_s(spans)
    count = min(iterations, len(ends_s))
    first = (len(ends_s) - count) // 2
    last = first + count - 1
    start_s = ends_s[first - 1] if first else min(span.start_s for span in spans)
    return Window(start_s=start_s, stop_s=ends_s[last], first_iteration=first, last_iteration=last)


def draw_gantt(
    timelines: Mapping[str, Sequence[Span]],
    out: Path,
    *,
    labels: Mapping[int, str] | None = None,
    iterations: int = 3,
    window_s: float | None = None,
) -> None:
    """Draw timelines above each other: one panel each, one row per stage, forward light, backward dark.

    Args:
        timelines: Spans by title, in order from the top.
        out: PNG, SVG or PDF, by its suffix; whole or absent.
        labels: What each hTask is, for the legend (its task ids, say).
        iterations: Shown from the middle of each timeline.
        window_s: Length of the time axis; the longest window by default.

    Raises:
        UserError: A timeline has no complete iteration, or nothing can be written in that format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in formats:
        raise UserError(f"cannot draw {out}: expected a file name that ends in .png, .svg or .pdf")
    shown = {title: _compute_spans(title, spans) for title, spans in timelines.items()}
    windows = {title: middle_window(spans, iterations) for title, spans in shown.items()}
    width_s = window_s or 1.02 * max(w.stop_s - w.start_s for w in windows.values())
    stages = [1 + max(span.stage for span in spans) for spans in shown.values()]
    htasks = sorted({span.action.htask for spans in shown.values() for span in spans})
    colours = _colours(htasks)

    legend_lines = -(-(len(htasks) + 3) // 2)  # two columns
    height = sum(stages) * _ROW_INCHES + 0.55 * len(stages) + 0.22 * legend_lines + 0.6
    figure = Figure(figsize=(13, height), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=stages)[:, 0]
    for axes, (title, spans) in zip(panels, shown.items(), strict=True):
        _draw_panel(axes, spans, windows[title], width_s, colours)
        _title(axes, title, windows[title])
    panels[-1].set_xlabel("ms from the start of the first iteration shown")
    _add_legend(figure, colours, labels or {})
    write_atomically(
        out, lambda temporary: figure.savefig(temporary, dpi=150, format=out.suffix.removeprefix(".").lower())
    )


def draw_plan(plan: Plan, out: Path, *, run_dir: Path | None = None) -> None:
    """Draw the simulated timeline of a plan, and below it the measured one of a run of that plan.

    Raises:
        UserError: See :func:`draw_gantt`, or the run has no trace.
    """
    from sim import simulate_plan

    timelines: dict[str, Sequence[Span]] = {
        "simulated": simulate_plan(plan, iterations=_SIMULATED_ITERATIONS).spans
    }
    if run_dir is not None:
        timelines["measured"] = load_trace(run_dir / "trace.json")
    draw_gantt(timelines, out, labels={htask.id: ", ".join(htask.task_ids) for htask in plan.htasks})


def _compute_spans(title: str, spans: Sequence[Span]) -> list[Span]:
    compute = [span for span in spans if span.stream == COMPUTE]
    if not iteration_ends_s(compute):
        raise UserError(f"the timeline {title!r} has no complete iteration to draw")
    return compute


def _colours(htasks: Sequence[int]) -> dict[int, Shades]:
    """Light and dark colour per hTask, far apart for neighbouring numbers."""
    import colorsys

    pairs = {}
    for position, htask in enumerate(htasks):
        hue = (0.58 + position * 0.381966) % 1  # golden ratio: no two of the first dozen are alike
        pairs[htask] = (colorsys.hls_to_rgb(hue, 0.76, 0.62), colorsys.hls_to_rgb(hue, 0.42, 0.62))
    return pairs


def _draw_panel(
    axes: Axes,
    spans: Sequence[Span],
    window: Window,
    width_s: float,
    colours: Mapping[int, Shades],
) -> None:
    stages = 1 + max(span.stage for span in spans)
    for span in spans:
        start_s = max(span.start_s - window.start_s, 0.0)
        stop_s = min(span.end_s - window.start_s, width_s)
        action = span.action
        if action.kind == "STEP":
            if 0 <= span.end_s - window.start_s <= width_s:
                top = span.stage - _BAR_HEIGHT / 2
                axes.plot(
                    [stop_s * 1e3], [top - 0.03], marker="v", markersize=4.5, color=colours[action.htask][1],
                    markeredgecolor="black", markeredgewidth=0.5, clip_on=False, zorder=4,
                )  # fmt: skip
            continue
        if stop_s <= start_s:
            continue
        light, dark = colours[action.htask]
        backward = action.kind == "B"
        axes.barh(
            span.stage,
            (stop_s - start_s) * 1e3,
            left=start_s * 1e3,
            height=_BAR_HEIGHT,
            color=dark if backward else light,
            edgecolor="white",
            linewidth=0.6,
        )
        label = f"{action.htask}.{action.number}"
        if stop_s - start_s > len(label) * _CHARACTER_SHARE * width_s:
            axes.text(
                (start_s + stop_s) / 2 * 1e3,
                span.stage,
                label,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if backward else "black",
            )
    axes.set_xlim(0, width_s * 1e3)
    axes.set_ylim(stages - 0.45, -0.62)  # stage 0 at the top, with room for its STEP marks
    axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for end_s in iteration_ends_s(spans):
        if 0 < end_s - window.start_s <= width_s:
            axes.axvline(
                (end_s - window.start_s) * 1e3, color="0.35", linewidth=0.8, linestyle=_DASHES, zorder=3
            )


def _title(axes: Axes, title: str, window: Window) -> None:
    count = window.last_iteration - window.first_iteration + 1
    mean_ms = (window.stop_s - window.start_s) / count * 1e3
    which = f"iteration {window.first_iteration}"
    if count > 1:
        which = f"iterations {window.first_iteration} to {window.last_iteration}"
    axes.set_title(
        f"{title}: {which}, {mean_ms:.1f} ms on average", loc="left", fontsize=10, fontweight="bold"
    )


def _add_legend(figure: Figure, colours: Mapping[int, Shades], labels: Mapping[int, str]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = []
    for htask, shades in colours.items():
        text = f"hTask {htask}" + (f": {labels[htask]}" if htask in labels else "")
        if len(text) > _LEGEND_CHARACTERS:
            text = text[: _LEGEND_CHARACTERS - 3] + "..."
        entries.append((tuple(Patch(facecolor=shade) for shade in shades), text))
    both = (Patch(facecolor="0.85"), Patch(facecolor="0.5"))
    step = Line2D(
        [], [], marker="v", color="none", markerfacecolor="0.5", markeredgecolor="black", markersize=5
    )
    end = Line2D([], [], color="0.35", linewidth=0.8, linestyle=_DASHES)
    entries += [
        (both, "forward and backward; blank: waiting"),
        (step, "optimizer step of an hTask"),
        (end, "every task is one step further"),
    ]
    figure.legend(
        [handle for handle, _ in entries],
        [text for _, text in entries],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
    )
