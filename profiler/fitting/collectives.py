"""Fits :class:`muxtune.costs.links.LinkCoefficients` to measured transfers and all-reduces.

The rows are judged first (:mod:`profiler.fitting.judgement`). A link without rows left takes latencies and
the share of the data-sheet rate from a stand-in that has some. Without rows of its own, a transfer is a step
of the fitted all-reduce, or an all-reduce two transfers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from muxtune.cluster import GPUS, ClusterSpec
from muxtune.costs.collectives import Interconnect
from muxtune.costs.devices import FitRecord
from muxtune.costs.links import (
    Algorithm,
    LinkCoefficients,
    Protocol,
    RankProtocols,
    algorithm_load,
    algorithm_steps,
)
from muxtune.support.errors import SpecError
from muxtune.support.files import write_text_atomically
from muxtune.support.tables import format_table, show_percent
from profiler.fitting.alpha_beta import fit_lines
from profiler.fitting.judgement import Array, judge, link_load, load_rows, rows_of
from profiler.fitting.link_sources import SOURCES, LinkSource, Series

TABLE_SOURCE = (
    "profiling data of the Vidur simulator (github.com/microsoft/vidur, MIT licence), medians per size"
)
KERNEL_S = 2e-6
"""Seconds of a kernel that moves nothing, in these times without launches; too little of it shows to be
fitted."""

_BAND_EDGES = (2**16, 2**20)
BANDS = ("to 64 KiB", "to 1 MiB", "above")


def fit_link(table: pd.DataFrame, source: LinkSource) -> tuple[LinkCoefficients, pd.DataFrame]:
    """Coefficients of a link, and its judged rows with ``error``, ``|predicted / measured - 1|``."""
    rows = pd.concat(
        [judge(table, source, series) for series in (*source.series, *source.across)], ignore_index=True
    )
    kept = rows[rows["verdict"] == ""].reset_index(drop=True)
    if kept.empty:
        return _stand_in(table, source), rows.assign(error=np.nan)
    inside = None if source.inside is None else fit_link(table, SOURCES[source.inside])[0]
    coefficients = _fit_kept(kept, source, inside)
    rows = with_errors(coefficients, rows, inside)
    second = np.arange(len(kept)) % 2 == 1  # sizes ascend in each series
    half = _fit_kept(kept[~second].reset_index(drop=True), source, inside)
    unseen = with_errors(half, kept[second].reset_index(drop=True), inside)
    record = FitRecord(
        source=TABLE_SOURCE,
        created=datetime.now(UTC).date().isoformat(),
        command="python -m profiler.fitting collectives "
        f"--table collectives.parquet --link {source.name} --out links",
        rows=len(kept),
        error=round(float(rows.loc[rows["verdict"] == "", "error"].mean()), 4),
        held_out={
            title: round(float(group["error"].mean()), 4) for title, group in unseen.groupby(_titles(unseen))
        },
    )
    return coefficients.model_copy(update={"fit": record}), rows


def with_errors(
    coefficients: LinkCoefficients, rows: pd.DataFrame, inside: LinkCoefficients | None = None
) -> pd.DataFrame:
    """The rows with ``error``, ``|predicted / measured - 1|``.

    Args:
        coefficients: Coefficients of the link that the rows use.
        rows: Rows with ``seconds``.
        inside: Link inside the nodes, for all-reduces of several ranks per node on a network.
    """
    seconds = np.empty(len(rows))
    columns = [rows[name] for name in ("collective", "num_workers", "devices_per_node")]
    for series in {Series(*key) for key in zip(*columns, strict=True)}:
        own = np.logical_and.reduce([column == value for column, value in zip(columns, series, strict=True)])
        seconds[own] = _predict(coefficients, series, rows.loc[own, "bytes"].to_numpy(float), inside)
    return rows.assign(error=np.abs(seconds / rows["seconds"] - 1))


def _fit_kept(kept: pd.DataFrame, source: LinkSource, inside: LinkCoefficients | None) -> LinkCoefficients:
    """Coefficients that fit rows of one link, at least one of them of its own series."""
    send_recv: tuple[Protocol, ...] = ()
    all_reduce: list[RankProtocols] = []
    for series in source.series:
        rows = rows_of(kept, source.topology, series)
        if len(rows) < _LEAST_ROWS:
            continue
        load = link_load(series)
        lines = fit_lines(
            rows["bytes"].to_numpy(float),
            rows["seconds"].to_numpy(),
            least_s_per_byte=load / source.datasheet_bytes_per_s,
        )
        if series.collective == "send_recv":
            send_recv = _transfers(lines)
        else:
            all_reduce.append(RankProtocols(ranks=series.ranks, protocols=_protocols(lines, series.ranks)))
    basis = f"{source.datasheet}; measured: {', '.join(_fitted(send_recv, all_reduce))}"
    if not send_recv:
        send_recv = _as(all_reduce[0].protocols, "direct")
        basis += "; a transfer is a step of the all-reduce"
    if not all_reduce:
        all_reduce.append(RankProtocols(ranks=2, protocols=_as(send_recv, "ring")))
        basis += "; an all-reduce of two ranks is two transfers of half the tensor"
    coefficients = LinkCoefficients(
        link=source.link,
        device=source.device,
        kernel_s=KERNEL_S,
        send_recv=send_recv,
        all_reduce=tuple(all_reduce),
        flows_per_node=source.flows_per_node,
        basis=basis,
        fit=None,
    )
    across = [rows_of(kept, source.topology, series) for series in source.across]
    if not across or inside is None:
        return coefficients
    measured = pd.concat(across, ignore_index=True)

    def error(flows: int) -> float:
        candidate = coefficients.model_copy(update={"flows_per_node": flows})
        return float(np.log1p(with_errors(candidate, measured, inside)["error"]).mean())

    return coefficients.model_copy(update={"flows_per_node": min(range(1, _MOST_FLOWS + 1), key=error)})


_LEAST_ROWS = 16
_MOST_FLOWS = 8
"""Ports of a node, at most."""


def _fitted(send_recv: Sequence[Protocol], all_reduce: Sequence[RankProtocols]) -> list[str]:
    found = ["transfers"] if send_recv else []
    if all_reduce:
        found.append(f"all-reduces of {', '.join(str(entry.ranks) for entry in all_reduce)} ranks")
    return found


def _protocols(lines: Array, ranks: int) -> tuple[Protocol, ...]:
    """Lines as algorithms: of more than two ranks, what starts fastest is a tree, and the rest are rings."""
    protocols: list[Protocol] = []
    for i, (latency_s, s_per_byte) in enumerate(lines.tolist()):
        algorithm: Algorithm = "tree" if ranks > 2 and i == 0 and len(lines) > 1 else "ring"
        steps = algorithm_steps(algorithm, ranks)
        protocols.append(
            Protocol(
                algorithm=algorithm,
                step_s=_rounded(max(latency_s - KERNEL_S, 0) / steps),
                bandwidth_bytes_per_s=_rounded(algorithm_load(algorithm, ranks) / s_per_byte),
            )
        )
    return tuple(protocols)


def _transfers(lines: Array) -> tuple[Protocol, ...]:
    return tuple(
        Protocol(
            algorithm="direct",
            step_s=_rounded(max(latency_s - KERNEL_S, 0)),
            bandwidth_bytes_per_s=_rounded(1 / s_per_byte),
        )
        for latency_s, s_per_byte in lines.tolist()
    )


def _as(protocols: Sequence[Protocol], algorithm: Algorithm) -> tuple[Protocol, ...]:
    return tuple(p.model_copy(update={"algorithm": algorithm}) for p in protocols)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _stand_in(table: pd.DataFrame, source: LinkSource) -> LinkCoefficients:
    """Coefficients of the link that stands in, with rates in proportion to the data sheets'.

    Raises:
        SpecError: There is none.
    """
    if source.stand_in is None:
        raise SpecError(f"rows of {source.name}", 0, f"some of {source.topology} that can be used")
    other = SOURCES[source.stand_in]
    coefficients, _ = fit_link(table, other)
    ratio = source.datasheet_bytes_per_s / other.datasheet_bytes_per_s

    def scaled(protocols: Sequence[Protocol]) -> tuple[Protocol, ...]:
        return tuple(
            p.model_copy(update={"bandwidth_bytes_per_s": _rounded(ratio * p.bandwidth_bytes_per_s)})
            for p in protocols
        )

    return LinkCoefficients(
        link=source.link,
        device=source.device,
        kernel_s=KERNEL_S,
        send_recv=scaled(coefficients.send_recv),
        all_reduce=tuple(
            RankProtocols(ranks=entry.ranks, protocols=scaled(entry.protocols))
            for entry in coefficients.all_reduce
        ),
        flows_per_node=source.flows_per_node,
        basis=f"{source.datasheet}; latencies and share of the data-sheet rate of {source.stand_in}",
        fit=None,
    )


def _predict(
    coefficients: LinkCoefficients, series: Series, bytes_: Array, inside: LinkCoefficients | None
) -> Array:
    """Seconds of a series through the cost model itself."""
    nodes = series.ranks // series.per_node
    cluster = ClusterSpec(
        name="measured",
        device=GPUS[coefficients.device],
        ranks=series.ranks,
        nodes=nodes,
        within_node="nvlink-all",
        between_nodes="infiniband" if nodes > 1 else None,
    )
    links = Interconnect(cluster, inside or coefficients, between=coefficients if nodes > 1 else None)
    if series.collective == "send_recv":
        return links.send_recv_s(bytes_, across_nodes=nodes > 1)
    return links.all_reduce_s(bytes_, series.ranks)


def _titles(rows: pd.DataFrame) -> list[str]:
    """Series and band of sizes of each row."""
    bands = np.searchsorted(_BAND_EDGES, rows["bytes"].to_numpy())
    columns = (rows["collective"], rows["num_workers"], rows["devices_per_node"], bands)
    return [
        f"{collective} {ranks} ranks{'' if ranks == per_node else f', {per_node} per node'}, {BANDS[band]}"
        for collective, ranks, per_node, band in zip(*columns, strict=True)
    ]


def main(arguments: Sequence[str]) -> None:
    """Fit links, print what was judged and the errors, and write the coefficients.

    Raises:
        UserError: The table cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m profiler.fitting collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, required=True, help="Parquet file with the measurements")
    parser.add_argument("--link", choices=sorted(SOURCES), action="append", help="all of them unless given")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    table = load_rows(options.table)
    for name in options.link or SOURCES:
        coefficients, rows = fit_link(table, SOURCES[name])
        write_text_atomically(options.out / f"{name}.json", coefficients.model_dump_json(indent=2) + "\n")
        print(f"\n## {name}: {coefficients.basis}\n")
        print(_report(coefficients, rows))


def _report(coefficients: LinkCoefficients, rows: pd.DataFrame) -> str:
    """Per series and band: rows, why some were not fitted, and errors of fitted, unseen and all rows."""
    held_out = coefficients.fit.held_out if coefficients.fit else {}
    lines: list[list[str]] = []
    for title, group in rows.groupby(_titles(rows), sort=False):
        reasons = group.loc[group["verdict"] != "", "verdict"].value_counts()
        kept = group.loc[group["verdict"] == "", "error"].mean()
        unseen = held_out.get(str(title), math.nan)
        lines.append(
            [
                str(title),
                str(len(group)),
                ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none",
                *("" if math.isnan(e) else show_percent(e) for e in (kept, unseen, group["error"].mean())),
            ]
        )
    return format_table(["series", "rows", "not fitted", "fitted", "unseen sizes", "with unfitted"], lines)
