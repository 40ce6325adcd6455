"""Values only: schedules of clocks against exact play of single operators."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.orchestration import MODES, launch_graph, schedule_clock
from tests.muxtune.orchestration.graphs import chain, clocks, play_slowly, run_orders
from tests.sampling import examples

CONTENTIONS = st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0])
ROUNDING = 1e-9  # sums in another order


def _scheduled(graphs, mode, contention=0.0):
    return schedule_clock([launch_graph(graph) for graph in graphs], mode, contention)


def _at_most(shorter, longer):
    return shorter <= longer * (1 + ROUNDING) + ROUNDING


@given(clocks(), st.sampled_from(MODES), CONTENTIONS)
def test_every_operator_runs_once_after_its_inputs_and_alone_on_its_stream(graphs, mode, contention):
    schedule = _scheduled(graphs, mode, contention)
    nodes = [graph.expand() for graph in graphs]
    turns = schedule.operators
    expected = {
        stream: {(h, i) for h, each in enumerate(nodes) for i in range(len(each)) if each[i].stream == stream}
        for stream in ("compute", "communication")
    }
    assert {stream: set(each) for stream, each in turns.items()} == expected
    assert all(len(each) == len(set(each)) for each in turns.values())
    for launches in schedule.launches.values():
        for before, after in pairwise(launches):
            assert before.start_s <= before.end_s <= after.start_s
    cuts = [launch_graph(graph).cut.subgraphs for graph in graphs]
    at = {(each.htask, each.subgraph): each for found in schedule.launches.values() for each in found}
    assert len(at) == sum(map(len, cuts))
    for (htask, number), launch in at.items():
        assert all(at[htask, dep].end_s <= launch.start_s for dep in cuts[htask][number].deps)


@given(clocks(), st.sampled_from(["round-robin", "interleaved"]), CONTENTIONS)
def test_times_are_those_of_single_operators_played_event_by_event(graphs, mode, contention):
    schedule = _scheduled(graphs, mode, contention)
    if schedule.barrier != "none":
        return  # see the sums below
    nodes = [graph.expand() for graph in graphs]
    times_s = play_slowly(nodes, schedule.operators, contention)
    assert schedule.seconds == pytest.approx(max(end for _, end in times_s.values()), rel=ROUNDING)
    for found in schedule.launches.values():
        for each in found:
            subgraph = launch_graph(graphs[each.htask]).cut.subgraphs[each.subgraph]
            ran = [times_s[each.htask, node] for node in subgraph.nodes]
            assert each.start_s == pytest.approx(ran[0][0], rel=ROUNDING, abs=ROUNDING)
            assert each.end_s == pytest.approx(ran[-1][1], rel=ROUNDING, abs=ROUNDING)
    assert schedule.exposed_communication_s == pytest.approx(_exposed(schedule), rel=ROUNDING, abs=ROUNDING)


def _exposed(schedule):
    """Seconds in which the communication stream is busy and the compute stream is not, piece by piece."""
    busy = {
        stream: [(each.start_s, each.end_s) for each in found] for stream, found in schedule.launches.items()
    }
    marks = sorted({mark for spans in busy.values() for span in spans for mark in span})
    exposed_s = 0.0
    for start_s, end_s in pairwise(marks):
        on = {s: any(a <= start_s and end_s <= b for a, b in spans) for s, spans in busy.items()}
        if on["communication"] and not on["compute"]:
            exposed_s += end_s - start_s
    return exposed_s


@given(clocks(), CONTENTIONS)
def test_sequential_is_the_sum_and_exposes_all_communication(graphs, contention):
    schedule = _scheduled(graphs, "sequential", contention)
    nodes = [node for graph in graphs for node in graph.expand()]
    assert schedule.seconds == sum(node.seconds for node in nodes)  # whole numbers
    on_link = sum(node.seconds for node in nodes if node.stream == "communication")
    assert schedule.exposed_communication_s == _exposed(schedule) == on_link


@given(clocks(), CONTENTIONS)
def test_intra_is_each_htask_alone_one_after_the_other(graphs, contention):
    alone_s = [_scheduled([graph], "intra", contention).seconds for graph in graphs]
    together = _scheduled(graphs, "intra", contention)
    assert together.seconds == pytest.approx(sum(alone_s), rel=ROUNDING)
    assert together.exposed_communication_s == pytest.approx(_exposed(together), rel=ROUNDING, abs=ROUNDING)


@given(clocks(), CONTENTIONS)
def test_interleaved_is_never_slower_than_the_others_nor_below_the_bound(graphs, contention):
    schedules = {mode: _scheduled(graphs, mode, contention) for mode in MODES}
    best = schedules["interleaved"]
    assert all(_at_most(best.seconds, other.seconds) for other in schedules.values())
    assert all(_at_most(best.lower_bound_s, each.seconds) for each in schedules.values())
    bounds = best.bounds
    plain = max(bounds.compute_s, bounds.communication_s, bounds.operator_path_s)
    assert _at_most(plain, best.lower_bound_s)
    if contention < 1:
        assert _at_most(schedules["intra"].seconds, schedules["sequential"].seconds)


@settings(max_examples=examples(40))
@given(clocks(most=2, largest=3, most_parts=1, most_repeats=1), CONTENTIONS)
def test_bound_and_schedule_lie_on_both_sides_of_the_best_of_all_orders(graphs, contention):
    nodes = [graph.expand() for graph in graphs]
    streams = ("compute", "communication")
    times_s = []
    for order in run_orders(nodes):
        turns = {stream: [(h, i) for h, i in order if nodes[h][i].stream == stream] for stream in streams}
        times_s.append(max(end for _, end in play_slowly(nodes, turns, contention).values()))
    times_s.append(sum(node.seconds for each in nodes for node in each))
    schedule = _scheduled(graphs, "interleaved", contention)
    assert _at_most(schedule.lower_bound_s, min(times_s))
    assert _at_most(min(times_s), schedule.seconds)
    assert schedule.seconds <= 1.5 * min(times_s)  # a list schedule of a handful of operators


@given(clocks(), st.sampled_from(MODES))
def test_more_contention_is_never_faster(graphs, mode):
    seconds = [_scheduled(graphs, mode, contention).seconds for contention in (0.0, 0.1, 0.5, 0.99, 1.0, 2.0)]
    assert all(_at_most(less, more) for less, more in pairwise(seconds))


@given(clocks(), st.sampled_from(MODES), CONTENTIONS)
def test_schedules_are_deterministic(graphs, mode, contention):
    first, second = (_scheduled(graphs, mode, contention) for _ in range(2))
    assert first == second
    assert first.launches == second.launches


def test_one_htasks_all_reduce_runs_under_the_others_computing():
    graphs = [chain(2.0, 1.0, 2.0, 1.0), chain(2.0, 1.0, 2.0, 1.0)]
    assert _scheduled(graphs, "sequential").seconds == 12
    assert _scheduled(graphs, "intra").seconds == 12
    best = _scheduled(graphs, "interleaved")
    assert best.seconds == 9  # 4 times 2 of computing, and the last all-reduce
    assert best.exposed_communication_s == 1
    assert best.lower_bound_s == 8
    slowed = _scheduled(graphs, "interleaved", 0.25)
    assert slowed.seconds == 9 + 0.25 * 3
    assert slowed.exposed_communication_s == 1
    assert slowed.lower_bound_s == 8 + 0.25 * 4


def test_ends_are_exact_sums_without_contention():
    graphs = [chain(0.1, 0.7, 0.1, 0.7), chain(0.3, 0.2, 0.3, 0.2)]
    schedule = _scheduled(graphs, "interleaved")
    for found in schedule.launches.values():
        for each in found:
            assert each.end_s == each.start_s + launch_graph(graphs[each.htask]).seconds[each.subgraph]


@pytest.mark.parametrize("contention", [1.0, 1.5])
def test_overlap_that_does_not_pay_is_given_up(contention):
    schedule = _scheduled([chain(2.0, 1.0), chain(2.0, 1.0)], "interleaved", contention)
    assert (schedule.barrier, schedule.seconds) == ("launch", 6)


def test_a_clock_of_nothing_takes_no_time():
    for mode in MODES:
        schedule = schedule_clock([], mode)
        assert (schedule.seconds, schedule.lower_bound_s) == (0, 0)


def test_many_htasks_fill_both_streams():
    """As many chains as hide each other's waits come within the two ends of the larger total."""
    graphs = [chain(*[1.0, 1.0] * 20) for _ in range(8)]
    schedule = _scheduled(graphs, "interleaved")
    assert math.isclose(schedule.seconds, 161.0)
