"""The costs report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import groupby

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from experiments.costs.report import BANDS, CostsReport, ErrorSummary, ShippedFit
from muxtune.support.printable import printable
from muxtune.support.tables import show_percent

__all__ = ["render_report"]

_TITLES = {
    "gemm": "Matrix products",
    "pointwise": "Element-wise operators, norms, rotary and token embedding",
    "collectives": "Transfers and collectives",
}
_COSTS = {"analytic": "device model", "measured": "interpolated between the other models' measurements"}
_BAND_TITLES = (
    ("to 128 tokens", "to 1,024", "above", "all"),
    ("to 1 MiB", "to 32 MiB", "above", "all"),
)
"""Titles of :data:`BANDS` in tokens and in bytes, and of all sizes."""
_GOOD, _FAIR = 0.05, 0.10


def render_report(report: CostsReport, *, width: int, colour: bool) -> str:
    """Tables of what ships, and of the errors where there are any.

    Args:
        report: Report from :func:`experiments.costs.report.report_costs`.
        width: Columns of the terminal.
        colour: Whether it shows colours.
    """
    console = Console(
        file=StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    with console.capture() as captured:
        for part in _parts(report):
            console.print(part)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines).strip("\n")


def _parts(report: CostsReport) -> Iterator[RenderableType]:
    for part, fits in groupby(report.fits, key=lambda fit: fit.part):
        shipped = list(fits)
        yield _title(f"{_TITLES[part]}: mean error of the shipped coefficients")
        yield _link_fits(shipped) if part == "collectives" else _device_fits(shipped)
        for origin in dict.fromkeys(_origin(fit) for fit in shipped if fit.fit is not None):
            yield Text(f"  {origin}\n", style="dim")
    for part, summaries in groupby(report.errors, key=lambda summary: summary.part):
        yield from _error_tables(part, list(summaries))
    if report.notes:
        yield Text("Not in these errors:", style="bold")
        yield from (Text(f"  {printable(note)}", style="dim") for note in report.notes)
        yield ""
    if report.files:
        yield Text(printable(f"Written: {', '.join(map(str, report.files))}"))


def _origin(shipped: ShippedFit) -> str:
    """Source, date and command, which is the same for all but for the name."""
    assert shipped.fit is not None
    kind = "LINK" if shipped.part == "collectives" else "DEVICE"
    command = shipped.fit.command.replace(shipped.name, kind)
    return f"{shipped.fit.source}; fitted {shipped.fit.created}: {command}"


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1))


def _device_fits(fits: Sequence[ShippedFit]) -> Table:
    table = _table()
    table.add_column("device", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("all", justify="right")
    table.add_column("held out", justify="right")
    table.add_column("")
    for shipped in fits:
        fit = shipped.fit
        if fit is None:
            table.add_row(shipped.name, "", "", "", Text(shipped.basis or "", style="dim"))
            continue
        errors = Text("\n").join(_percent(error) for error in fit.held_out.values())
        table.add_row(shipped.name, f"{fit.rows:,}", _percent(fit.error), errors, "\n".join(fit.held_out))
    return table


def _link_fits(fits: Sequence[ShippedFit]) -> Table:
    """Series below each other, sizes beside each other; what is held out is named ``SERIES, SIZES``."""
    pairs = [name.rpartition(", ")[::2] for fit in fits if fit.fit for name in fit.fit.held_out]
    sizes = sorted({size for _, size in pairs}, key=lambda size: (not size.startswith("to"), "MiB" in size))
    table = _table()
    table.add_column("link", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("all", justify="right")
    table.add_column("held out: every other size of")
    for size in sizes:
        table.add_column(size, justify="right")
    for shipped in fits:
        fit = shipped.fit
        if fit is None:
            table.add_row(shipped.name, "", "", Text(shipped.basis or "", style="dim"), end_section=True)
            continue
        series = list(dict.fromkeys(name.rpartition(", ")[0] for name in fit.held_out))
        for place, one in enumerate(series):
            errors = [fit.held_out.get(f"{one}, {size}") for size in sizes]
            first = [shipped.name, f"{fit.rows:,}", _percent(fit.error)] if place == 0 else ["", "", ""]
            cells = ["" if error is None else _percent(error) for error in errors]
            table.add_row(*first, one, *cells, end_section=one == series[-1])
    return table


def _error_tables(part: str, summaries: Sequence[ErrorSummary]) -> Iterator[RenderableType]:
    known = {(s.device, s.operator, s.group, s.band, s.cost): s for s in summaries}
    costs = list(dict.fromkeys(s.cost for s in summaries))
    how = " / ".join(_COSTS[cost] for cost in costs)

    def cell(device: str, operator: str | None, group: str | None, band: str | None) -> Text:
        found = [known.get((device, operator, group, band, cost)) for cost in costs]
        return Text(" / ").join(_percent(one.mean) for one in found if one is not None)

    yield _title(f"{_TITLES[part]}: mean error on the given tables, by size: {how}")
    table = _table()
    table.add_column("link" if part == "collectives" else "device", no_wrap=True)
    table.add_column("operator", no_wrap=True)
    for title in _BAND_TITLES[part == "collectives"]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("p90", justify="right")
    table.add_column("rows", justify="right")
    keys = dict.fromkeys((s.device, s.operator) for s in summaries if s.group is s.band is None)
    for device, operator in sorted(keys, key=lambda key: (key[0], key[1] is None, key[1])):
        whole = known[device, operator, None, None, "analytic"]
        cells = [cell(device, operator, None, band) for band in (*BANDS, None)]
        end = (_percent(whole.p90), f"{whole.rows:,}")
        table.add_row(_given(device), _given(operator or "all"), *cells, *end, end_section=operator is None)
    yield table

    yield _title(f"{_TITLES[part]}: mean error on the given tables, by {_group(part)}: {how}")
    table = _table()
    table.add_column("link" if part == "collectives" else "device", no_wrap=True)
    table.add_column(_group(part), no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("rows", justify="right")
    for device, group in dict.fromkeys((s.device, s.group) for s in summaries if s.group is not None):
        whole = known[device, None, group, None, "analytic"]
        table.add_row(_given(device), _given(group or ""), cell(device, None, group, None), f"{whole.rows:,}")
    yield table


def _given(name: str) -> Text:
    """A name out of a user's table, which is neither markup nor moves the cursor."""
    return Text(printable(name))


def _group(part: str) -> str:
    return "series" if part == "collectives" else "model"


def _percent(error: float) -> Text:
    style = "green" if error <= _GOOD else "yellow" if error <= _FAIR else "red"
    return Text(show_percent(error), style=style)
