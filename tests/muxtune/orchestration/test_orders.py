"""Values only: launch orders in a plan."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.orchestration import (
    MODES,
    LaunchOrder,
    decode_turns,
    encode_turns,
    launch_graph,
    replay_clock,
    schedule_clock,
)
from muxtune.support.errors import SpecError
from tests.muxtune.orchestration.graphs import chain, clocks

TWO = [launch_graph(chain(2.0, 1.0, 2.0)), launch_graph(chain(1.0, 1.0))]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400))))
def test_turns_survive_their_text(turns):
    assert decode_turns(encode_turns(turns)) == tuple(turns)


def test_runs_are_short():
    assert encode_turns([(0, 0), (0, 1), (0, 2), (1, 0), (0, 3)]) == "0:0-2 1:0 0:3"


@given(clocks(), st.sampled_from(MODES), st.sampled_from([0.0, 0.5, 2.0]))
def test_an_order_gives_its_schedule_again(graphs, mode, contention):
    launches = [launch_graph(graph) for graph in graphs]
    schedule = schedule_clock(launches, mode, contention)
    again = replay_clock(launches, schedule.order, mode, contention)
    assert again.seconds == pytest.approx(schedule.seconds, rel=1e-12)
    assert again.order == schedule.order
    if schedule.barrier != "launch":  # there the streams of an hTask may take turns otherwise
        for stream, found in schedule.launches.items():
            for one, other in zip(found, again.launches[stream], strict=True):
                assert (one.htask, one.subgraph) == (other.htask, other.subgraph)
                assert one.start_s == pytest.approx(other.start_s, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [("0:0 x", "'x'"), ("0*3", "'0*3'"), ("0:-1", "'0:-1'"), ("0:1-", "'0:1-'")],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(SpecError, match=re.escape(f"launch order = {message}: expected HTASK:NUMBER")):
        decode_turns(text)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            LaunchOrder("none", ((0, 0), (0, 1)), ((0, 0), (1, 0))),
            "compute = '0:0-1': expected every subgraph once: 2 of hTask 0, 1 of hTask 1",
        ),
        (LaunchOrder("none", ((0, 0), (0, 1), (0, 1)), ((0, 0), (1, 0))), "compute = '0:0-1 0:1'"),
        (LaunchOrder("none", ((0, 0), (0, 1), (2, 0)), ((0, 0), (1, 0))), "compute = '0:0-1 2:0'"),
        (
            LaunchOrder("none", ((0, 0), (0, 1), (1, 0)), ()),
            "communication = '': expected every subgraph once",
        ),
        (
            LaunchOrder("none", ((0, 1), (0, 0), (1, 0)), ((0, 0), (1, 0))),
            "compute turn 0 and communication turn 0 wait",
        ),
        (
            LaunchOrder("htask", ((0, 0), (1, 0), (0, 1)), ((0, 0), (1, 0))),
            "compute = '0:0 1:0 0:1': expected one hTask after the other",
        ),
    ],
    ids=str,
)
def test_orders_of_other_graphs_are_refused(order, message):
    with pytest.raises(SpecError, match=message):
        replay_clock(TWO, order, "interleaved")
