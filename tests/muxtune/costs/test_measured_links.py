"""Links of this machine: what a profile shows, and nothing where it shows nothing."""

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.measured_links import link_from_profile
from muxtune.graph.operators import Operator
from muxtune.support.errors import SpecError, UserError
from tests.muxtune.costs.synthetic import make_profile

SIZES = (4096, 65536, 1 << 20, 8 << 20)
TRANSFERS = [Operator("p2p", (n,)) for n in SIZES]


def transfer_law(op, phase):
    return 80e-6 + op.dims[-1] / 2e9


def test_transfers_follow_the_profile():
    links = interconnect_of(load_cluster("cpu-2"), profile=make_profile(transfer_law, TRANSFERS))
    for size in (1e3, 1e5, 1e7):
        assert links.send_recv_s(size) == pytest.approx(80e-6 + size / 2e9, rel=1e-6)
        assert links.all_reduce_s(size, 2) == pytest.approx(80e-6 + size / 2e9, rel=1e-6)


def test_without_transfers_nothing_is_assumed():
    profile = make_profile(transfer_law, [Operator("norm", (64,))])
    with pytest.raises(UserError, match="has no transfers; expected one of two ranks or more"):
        interconnect_of(load_cluster("cpu-2"), profile=profile)
    with pytest.raises(SpecError, match="within_node of cpu-2 = 'loopback-gloo': expected a profile"):
        interconnect_of(load_cluster("cpu-2"))


def test_measured_all_reduces_come_before_the_textbook():
    rows = [Operator("all_reduce", (n, ranks)) for ranks in (2, 4) for n in SIZES]

    def law(op, phase):
        if op.kind == "p2p":
            return transfer_law(op, phase)
        return op.dims[1] * (100e-6 + op.dims[0] / 1e9)

    coefficients = link_from_profile(make_profile(law, [*TRANSFERS, *rows]))
    assert coefficients.basis == "fitted to 4 transfers and 8 all-reduces"
    links = interconnect_of(load_cluster("cpu-4"), profile=make_profile(law, [*TRANSFERS, *rows]))
    for ranks in (2, 4):
        for size in (1e4, 1e6):
            assert links.all_reduce_s(size, ranks) == pytest.approx(ranks * (100e-6 + size / 1e9), rel=1e-3)


def test_sizes_that_show_no_rate_give_a_latency():
    profile = make_profile(lambda op, phase: 90e-6, TRANSFERS)
    links = interconnect_of(load_cluster("cpu-2"), profile=profile)
    assert links.send_recv_s(1e6) == pytest.approx(90e-6, rel=1e-3)


def test_a_rate_that_no_size_shows_is_said():
    """Larger messages that took less time, as noise has it."""
    coefficients = link_from_profile(make_profile(lambda op, phase: 90e-6 - 1e-12 * op.dims[0], TRANSFERS))
    assert coefficients.basis == "fitted to 4 transfers, whose sizes show no rate, textbook collectives"
