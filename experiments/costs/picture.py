"""A picture of the errors of predicted costs against the size of the operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.costs.errors import ANALYTIC, MEASURED
from muxtune.support.errors import UserError
from muxtune.support.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_errors"]

_CLASSES = {
    "attn_pre_proj": "query, key, value projection",
    "attn_post_proj": "attention output projection",
    "mlp_up_proj": "MLP up (and gate) projection",
    "mlp_down_proj": "MLP down projection",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "attn_rope": "rotary embedding",
    "mlp_act": "activation",
    "emb": "token embedding",
    "add": "residual addition",
    "all_reduce": "all-reduce",
    "send_recv": "send and receive",
}
"""Titles of the panels, in this order; an operator that is not here has one of its own."""

_COLOURS = {"a40": "#4C9F70", "a100": "#3B6FB6", "h100": "#C8553D"}
"""Colour of each device. They differ in lightness too, for those who do not see all colours."""
_OTHER_COLOUR = "0.35"
_DASHES = (0, (2, 1.2))
_COLUMNS = 5
_BINS_PER_OCTAVE = 2
_LEAST_ROWS = 3  # of a bin; fewer have no percentile worth drawing
_TOP = 0.3
_GUIDES = (0.05, 0.1)


def draw_errors(rows: pd.DataFrame, out: Path) -> None:
    """A panel per class of operators: median error against size, with a band up to the 90th percentile.

    Args:
        rows: Rows with the columns :data:`experiments.costs.errors.ROW_COLUMNS`.
        out: PNG, SVG or PDF, by its suffix; whole or absent.

    Raises:
        UserError: There is nothing to draw, or it cannot be written.
    """
    from matplotlib.figure import Figure

    if rows.empty:
        raise UserError(f"there are no errors to draw in {out}")
    titled = rows.assign(title=_titles(rows))
    lines = _lines_of_panels(titled)
    columns = max(map(len, lines))
    figure = Figure(figsize=(3.1 * columns + 0.7, 2.5 * len(lines) + 1.1), layout="constrained")
    panels = figure.subplots(len(lines), columns, squeeze=False)
    for line, titles in zip(panels, lines, strict=True):
        sizes = titled.loc[titled["title"].isin(titles), "size"]
        for place, axes in enumerate(line):
            if place >= len(titles):
                axes.set_axis_off()
                continue
            _draw_panel(axes, titled[titled["title"] == titles[place]])
            axes.set_title(titles[place], loc="left", fontsize=9, fontweight="bold")
            axes.set_xlim(sizes.min(), sizes.max())
            axes.tick_params(labelleft=place == 0)
    figure.supylabel(f"error, |predicted / measured - 1|, cut at {_TOP:.0%}", fontsize=9)
    _add_legend(figure, rows)
    kind = out.suffix.removeprefix(".").lower()
    write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=160, format=kind))


def _titles(rows: pd.DataFrame) -> list[str]:
    """Panel of each row: its class, and for collectives the kind of link."""
    titles = []
    for part, operator, device in zip(rows["part"], rows["operator"], rows["device"], strict=True):
        title = _CLASSES.get(operator, operator)
        titles.append(f"{title}, {device.rpartition('-')[0]}" if part == "collectives" else title)
    return titles


def _lines_of_panels(rows: pd.DataFrame) -> list[list[str]]:
    """Titles line by line; each part, and each collective, begins a line."""
    order = list(_CLASSES)
    known = rows.drop_duplicates(["part", "title"])
    places = [(order.index(name) if name in order else len(order)) for name in known["operator"]]
    known = known.assign(place=places).sort_values(["place", "title"], kind="stable")
    lines: list[list[str]] = []
    for part in dict.fromkeys(rows["part"]):
        own = known[known["part"] == part]
        heads = own["title"].str.split(",").str[0] if part == "collectives" else own["part"]
        for _, titles in own.groupby(heads, sort=False)["title"]:
            names = titles.tolist()
            lines += [names[start : start + _COLUMNS] for start in range(0, len(names), _COLUMNS)]
    return lines


def _draw_panel(axes: Axes, rows: pd.DataFrame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

    for guide in _GUIDES:
        axes.axhline(guide, color="0.8", linewidth=0.7, zorder=0)
    for device in sorted(set(rows["device"])):
        colour = _COLOURS.get(device.rpartition("-")[2], _OTHER_COLOUR)
        own = rows[rows["device"] == device]
        size, median, p90 = _binned(own[own["cost"] == ANALYTIC])
        axes.fill_between(size, median, p90, color=colour, alpha=0.14, linewidth=0, zorder=1)
        axes.plot(size, median, color=colour, linewidth=1.6, zorder=2)
        size, median, _ = _binned(own[own["cost"] == MEASURED])
        axes.plot(size, median, color=colour, linewidth=1.2, linestyle=_DASHES, zorder=3)
    collectives = bool((rows["part"] == "collectives").all())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=16 if collectives else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(_show_bytes if collectives else _show_tokens))
    axes.xaxis.minorticks_off()
    axes.set_xlabel("bytes" if collectives else "tokens", fontsize=8, labelpad=1)
    axes.set_ylim(0, _TOP)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=7.5, length=2.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _binned(rows: pd.DataFrame) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Middle size, median and 90th percentile of bins of half an octave."""
    place = np.round(np.log2(rows["size"].to_numpy(dtype=float)) * _BINS_PER_OCTAVE)
    groups = rows.assign(place=place).groupby("place")["error"]
    kept = groups.filter(lambda errors: len(errors) >= _LEAST_ROWS)
    groups = rows.assign(place=place).loc[kept.index].groupby("place")["error"]
    sizes = [2.0 ** (float(str(middle)) / _BINS_PER_OCTAVE) for middle, _ in groups]
    return sizes, groups.median().tolist(), groups.quantile(0.9).tolist()


def _add_legend(figure: Figure, rows: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {device.rpartition("-")[2] for device in set(rows["device"])}
    entries: list[tuple[Line2D | Patch, str]] = [
        (Line2D([], [], color=colour, linewidth=1.6), device.upper())
        for device, colour in _COLOURS.items()
        if device in names
    ]
    entries.append((Line2D([], [], color="0.3", linewidth=1.6), "median, device model"))
    entries.append((Patch(facecolor="0.3", alpha=0.2), "from there to the 90th percentile"))
    if (rows["cost"] == MEASURED).any():
        text = "median, interpolated between the other models' measurements"
        entries.append((Line2D([], [], color="0.3", linewidth=1.2, linestyle=_DASHES), text))
    figure.legend(
        [handle for handle, _ in entries],
        [text for _, text in entries],
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=8,
    )


def _show_tokens(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _show_bytes(value: float, _: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.0f} {name}"
    return f"{value:.0f} B"
