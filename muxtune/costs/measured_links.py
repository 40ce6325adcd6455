"""Links of this machine from a profile's transfers and collectives: gloo over loopback."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from muxtune.cluster import LOOPBACK, LinkSpec
from muxtune.costs.links import (
    LinkCoefficients,
    Protocol,
    RankProtocols,
    algorithm_load,
    algorithm_steps,
    link_from_spec,
)
from muxtune.costs.profile import Measurement, Profile
from muxtune.operators import dimensions
from muxtune.support.errors import UserError

_MOST_BYTES_PER_S = 1e15
"""Where the measured sizes are too small or too few to show a rate; the basis says so."""


def link_from_profile(profile: Profile) -> LinkCoefficients:
    """Alpha and beta of the measured rows of kinds ``p2p`` and ``all_reduce``.

    Without all-reduces the textbook algorithms run on the measured transfers. An all-reduce is fitted as a
    ring, per number of ranks, and a reduce-scatter or an all-gather is half of it.

    Raises:
        UserError: The profile has no transfers.
    """
    device = profile.provenance.device
    transfers = list(profile.of_kind("p2p"))
    if not transfers:
        raise UserError(f"profile {profile.profile_id} has no transfers; expected one of two ranks or more")
    latency_s, s_per_byte = _fit(transfers)
    spec = LinkSpec(name=LOOPBACK, latency_s=latency_s, bandwidth_bytes_per_s=1 / s_per_byte)
    textbook = link_from_spec(spec, device)
    by_ranks: dict[int, list[Measurement]] = defaultdict(list)
    for row in profile.of_kind("all_reduce"):
        by_ranks[_dimension(row, "ranks")].append(row)
    basis = f"fitted to {len(transfers)} transfers"
    if s_per_byte <= 1 / _MOST_BYTES_PER_S:
        basis += ", whose sizes show no rate"
    if not by_ranks:
        return textbook.model_copy(update={"basis": f"{basis}, textbook collectives"})
    measured = tuple(
        RankProtocols(ranks=ranks, protocols=(_ring(rows, ranks),))
        for ranks, rows in sorted(by_ranks.items())
    )
    count = sum(map(len, by_ranks.values()))
    return textbook.model_copy(update={"all_reduce": measured, "basis": f"{basis} and {count} all-reduces"})


def _ring(rows: list[Measurement], ranks: int) -> Protocol:
    latency_s, s_per_byte = _fit(rows)
    return Protocol(
        algorithm="ring",
        step_s=latency_s / algorithm_steps("ring", ranks),
        bandwidth_bytes_per_s=algorithm_load("ring", ranks) / s_per_byte,
    )


def _fit(rows: list[Measurement]) -> tuple[float, float]:
    """Seconds and seconds per byte, by relative least squares without negative values."""
    from scipy.optimize import nnls  # noqa: PLC0415  # a quarter of a second to import

    measured_s = np.array([row.median_s for row in rows])
    terms = np.array([(1.0, float(_dimension(row, "bytes"))) for row in rows]) / measured_s[:, None]
    scale = terms.max(axis=0)
    latency_s, s_per_byte = (nnls(terms / scale, np.ones(len(rows)))[0] / scale).tolist()
    return latency_s, max(s_per_byte, 1 / _MOST_BYTES_PER_S)


def _dimension(row: Measurement, name: str) -> int:
    return row.op.dims[dimensions(row.op.kind).index(name)]
