"""Pipeline timelines as a picture: what was simulated above what was measured, on one time axis.

Both play the same schedule, show the same iterations and name their tracks alike. In the lower one, dotted
lines say when the upper one had its iterations complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muxtune.plan import Plan, extend_schedule, stage_times
from muxtune.schedule import COMPUTE, ActionSpan, iteration_ends_s, load_trace, track_name
from muxtune.support.errors import UserError
from muxtune.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Window",
    "draw_gantt",
    "draw_plan",
    "gantt_figure",
    "iteration_window",
    "middle_window",
    "plan_figure",
    "same_windows",
]

_SIMULATED_ITERATIONS = 15  # enough beside those in the middle for a run that is slower
_ROW_INCHES = 0.5
_BAR_HEIGHT = 0.82
_CHARACTER_SHARE = 0.0052  # of the axis: bars without room for their label have none
_LEGEND_CHARACTERS = 88
_OWN_ENDS: dict[str, Any] = {"color": "0.35", "linewidth": 0.8, "linestyle": (0, (4, 3))}
_REFERENCE_ENDS: dict[str, Any] = {"color": "crimson", "linewidth": 1.1, "linestyle": (0, (1, 1.5))}

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


def middle_window(spans: Sequence[ActionSpan], iterations: int) -> Window:
    """The middle ``iterations`` iterations, or all where there are no more.

    An iteration begins where the one before it ended. Under the continuous template some work of the
    neighbours falls into it.
    """
    numbers = sorted({span.action.number for span in spans if span.action.kind == "STEP"})
    count = min(iterations, len(numbers))
    first = (len(numbers) - count) // 2
    return iteration_window(spans, numbers[first], numbers[first + count - 1])


def iteration_window(spans: Sequence[ActionSpan], first_iteration: int, last_iteration: int) -> Window:
    """The window of iterations given by their numbers, which the timeline has."""
    numbers = sorted({span.action.number for span in spans if span.action.kind == "STEP"})
    ends_s = dict(zip(numbers, iteration_ends_s(spans), strict=True))
    start_s = ends_s.get(first_iteration - 1, min(span.start_s for span in spans))
    return Window(
        start_s=start_s,
        stop_s=ends_s[last_iteration],
        first_iteration=first_iteration,
        last_iteration=last_iteration,
    )


def draw_gantt(
    timelines: Mapping[str, Sequence[ActionSpan]],
    out: Path,
    *,
    labels: Mapping[int, str] | None = None,
    iterations: int = 3,
    window_s: float | None = None,
) -> None:
    """Write :func:`gantt_figure` to a file.

    Args:
        timelines: See :func:`gantt_figure`, as for the others.
        out: PNG, SVG or PDF, by its suffix; whole or absent.
        labels: What each hTask is.
        iterations: Number of iterations that are shown.
        window_s: Length of the time axis.

    Raises:
        UserError: A timeline has no complete iteration, or nothing can be written in that format.
    """
    _check_format(out)
    _save(gantt_figure(timelines, labels=labels, iterations=iterations, window_s=window_s), out)


def _check_format(out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if out.suffix.removeprefix(".").lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"cannot draw {out}: expected a file name that ends in .png, .svg or .pdf")


def _save(figure: Figure, out: Path) -> None:
    kind = out.suffix.removeprefix(".").lower()
    write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=150, format=kind))


def gantt_figure(
    timelines: Mapping[str, Sequence[ActionSpan]],
    *,
    labels: Mapping[int, str] | None = None,
    iterations: int = 3,
    window_s: float | None = None,
) -> Figure:
    """Timelines above each other: one panel each, one row per stage, forward light, backward dark.

    Args:
        timelines: Spans by title, in order from the top. The first one's middle iterations are shown of all
            that have them; of others their own middle.
        labels: What each hTask is, for the legend (its task ids, say).
        iterations: Number of iterations that are shown.
        window_s: Length of the time axis; the longest window by default.

    Raises:
        UserError: A timeline has no complete iteration.
    """
    from matplotlib.figure import Figure

    shown = {title: _compute_spans(title, spans) for title, spans in timelines.items()}
    windows = same_windows(shown, iterations)
    width_s = window_s or 1.02 * max(w.stop_s - w.start_s for w in windows.values())
    stages = [1 + max(span.stage for span in spans) for spans in shown.values()]
    htasks = sorted({span.action.htask for spans in shown.values() for span in spans})
    colours = _colours(htasks)

    legend_lines = -(-(len(htasks) + 4) // 2)  # two columns
    height = sum(stages) * _ROW_INCHES + 0.55 * len(stages) + 0.22 * legend_lines + 0.6
    figure = Figure(figsize=(13, height), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=stages)[:, 0]
    reference: tuple[Sequence[ActionSpan], Window] | None = None
    for axes, (title, spans) in zip(panels, shown.items(), strict=True):
        _draw_panel(axes, spans, windows[title], width_s, colours)
        if reference is not None:
            spans_above, above = reference
            _draw_ends(axes, spans_above, above, above.stop_s - above.start_s, **_REFERENCE_ENDS)
        else:
            reference = spans, windows[title]
        _title(axes, title, windows[title])
    panels[-1].set_xlabel("ms from the start of the first iteration shown")
    _add_legend(figure, colours, labels or {}, title=next(iter(shown)) if len(shown) > 1 else None)
    return figure


def draw_plan(plan: Plan, out: Path, *, run_dir: Path | None = None) -> None:
    """Write :func:`plan_figure` to a file.

    Raises:
        UserError: See :func:`draw_gantt`, or the run has no trace.
    """
    _check_format(out)
    _save(plan_figure(plan, run_dir=run_dir), out)


def plan_figure(plan: Plan, *, run_dir: Path | None = None) -> Figure:
    """The simulated timeline of a plan, and below it the measured one of a run of that plan.

    Raises:
        UserError: See :func:`gantt_figure`, or the run has no trace.
    """
    labels = {htask.id: ", ".join(htask.task_ids) for htask in plan.htasks}
    if run_dir is None:
        from sim import simulate_plan

        spans = simulate_plan(plan, iterations=_SIMULATED_ITERATIONS).spans
        return gantt_figure({"simulated": spans}, labels=labels)
    measured = load_trace(run_dir / "trace.json")
    return gantt_figure({"simulated": _simulate_run(plan, measured), "measured": measured}, labels=labels)


def _simulate_run(plan: Plan, measured: Sequence[ActionSpan]) -> list[ActionSpan]:
    """The iterations that a run did, with the plan's durations."""
    from sim.engine import simulate_schedule

    steps = [span.action.number for span in measured if span.action.kind == "STEP"]
    if not steps:
        raise UserError("the run's trace has no complete iteration to draw")
    return simulate_schedule(extend_schedule(plan, max(steps) + 1, first=min(steps)), stage_times(plan))


def same_windows(shown: Mapping[str, Sequence[ActionSpan]], iterations: int) -> dict[str, Window]:
    """The middle iterations of the first timeline in all that have them; of others their own middle."""
    windows: dict[str, Window] = {}
    for title, spans in shown.items():
        first = next(iter(windows.values()), None)
        numbers = {span.action.number for span in spans if span.action.kind == "STEP"}
        if first is not None and {first.first_iteration, first.last_iteration} <= numbers:
            windows[title] = iteration_window(spans, first.first_iteration, first.last_iteration)
        else:
            windows[title] = middle_window(spans, iterations)
    return windows


def _compute_spans(title: str, spans: Sequence[ActionSpan]) -> list[ActionSpan]:
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
    spans: Sequence[ActionSpan],
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
    axes.set_yticks(range(stages), [track_name(stage, COMPUTE) for stage in range(stages)])
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _draw_ends(axes, spans, window, width_s, **_OWN_ENDS)


def _draw_ends(axes: Axes, spans: Sequence[ActionSpan], window: Window, width_s: float, **style: Any) -> None:
    """A vertical line where each iteration ends, as far as ``width_s`` from the window's start."""
    for end_s in iteration_ends_s(spans):
        if 0 < end_s - window.start_s <= width_s:
            axes.axvline((end_s - window.start_s) * 1e3, zorder=3, **style)


def _title(axes: Axes, title: str, window: Window) -> None:
    count = window.last_iteration - window.first_iteration + 1
    mean_ms = (window.stop_s - window.start_s) / count * 1e3
    which = f"iteration {window.first_iteration}"
    if count > 1:
        which = f"iterations {window.first_iteration} to {window.last_iteration}"
    axes.set_title(
        f"{title}: {which}, {mean_ms:.1f} ms on average", loc="left", fontsize=10, fontweight="bold"
    )


def _add_legend(
    figure: Figure, colours: Mapping[int, Shades], labels: Mapping[int, str], title: str | None
) -> None:
    """What is what; ``title`` is that of the timeline whose iterations are marked in the others."""
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
    end = Line2D([], [], **_OWN_ENDS)
    entries += [
        (both, "forward and backward; blank: waiting"),
        (step, "optimizer step of an hTask"),
        (end, "every task is one step further"),
    ]
    if title is not None:
        entries.append((Line2D([], [], **_REFERENCE_ENDS), f"the same in the timeline {title!r}"))
    figure.legend(
        [handle for handle, _ in entries],
        [text for _, text in entries],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8.5,
    )
