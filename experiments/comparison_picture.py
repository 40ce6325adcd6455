"""A comparison of policies as a picture: throughput beside memory, predicted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.comparison import Comparison, PolicyResult
from muxtune.support.errors import SpecError
from muxtune.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_picture", "comparison_figure", "draw_comparison"]

_SUFFIXES = (".png", ".svg", ".pdf")

_OURS, _THEIRS = "#C8553D", "#3B6FB6"
"""Bars of muxtune and its variants, and of the others. They differ in lightness too."""
_MEASURED = 0.55
"""Opacity of what was measured."""
_BAR_HEIGHT = 0.38
_GIB = 2**30


def check_picture(path: Path, where: str) -> None:
    """Refuse a picture that is none by its name.

    Raises:
        SpecError: Names ``where``, an option or the file.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise SpecError(where, path.name, f"a name that ends with {', '.join(_SUFFIXES[:-1])} or .pdf")


def draw_comparison(comparison: Comparison, out: Path, *, title: str) -> None:
    """Write :func:`comparison_figure` to a file.

    Args:
        comparison: Comparison of policies on one workload.
        out: PNG, SVG or PDF, by its suffix; whole or absent.
        title: What was compared, above the bars.

    Raises:
        UserError: The suffix is another one, or it cannot be written.
    """
    check_picture(out, "picture")
    kind = out.suffix.removeprefix(".").lower()
    figure = comparison_figure(comparison, title=title)
    write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=150, format=kind))


def comparison_figure(comparison: Comparison, *, title: str) -> Figure:
    """Bars per policy: effective tokens per second, and peak memory of the fullest rank.

    Args:
        comparison: Comparison of policies on one workload.
        title: What was compared, above the bars.
    """
    from matplotlib.figure import Figure

    results = comparison.policies
    figure = Figure(figsize=(11, 1.5 + 0.42 * len(results)), layout="constrained")
    rates, memory = figure.subplots(1, 2, sharey=True)
    _draw_bars(
        rates,
        results,
        predicted=[r.predicted.effective_tokens_per_s if r.predicted else None for r in results],
        measured=[r.measured.effective_tokens_per_s if r.measured else None for r in results],
        number="{:,.0f}",
    )
    _draw_bars(
        memory,
        results,
        predicted=[max(r.predicted.peak_memory_bytes) / _GIB if r.predicted else None for r in results],
        measured=[max(r.measured.peak_memory_bytes) / _GIB if r.measured else None for r in results],
        number="{:.1f}",
    )
    rates.set_xlabel("effective tokens/s")
    memory.set_xlabel("peak memory of the fullest rank, GiB")
    if comparison.device_memory_bytes is not None:
        limit_gib = comparison.device_memory_bytes / _GIB
        memory.axvline(limit_gib, color="0.35", linewidth=0.9, linestyle=(0, (4, 3)))
        memory.annotate(
            "limit of a rank ",
            (limit_gib, 0),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    return figure


def _draw_bars(
    axes: Axes,
    results: tuple[PolicyResult, ...],
    *,
    predicted: list[float | None],
    measured: list[float | None],
    number: str,
) -> None:
    both = any(value is not None for value in measured)
    offset = _BAR_HEIGHT / 2 if both else 0.0
    for row, result in enumerate(results):
        colour = _OURS if result.policy.startswith("muxtune") else _THEIRS
        if result.predicted is None:
            axes.annotate(
                "no plan", (0, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        for value, place, alpha in (
            (predicted[row], row - offset, 1.0),
            (measured[row], row + offset, _MEASURED),
        ):
            if value is None:
                continue
            bar = axes.barh(place, value, height=_BAR_HEIGHT * (1 if both else 2), color=colour, alpha=alpha)
            label = number.format(value)
            if both:
                label += " measured" if alpha < 1 else " predicted"
            axes.bar_label(bar, [label], padding=3, fontsize=8)
    axes.set_yticks(range(len(results)), [result.policy for result in results], fontsize=9)
    axes.set_ylim(len(results) - 0.5, -0.5)  # the first on top
    axes.margins(x=0.22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
