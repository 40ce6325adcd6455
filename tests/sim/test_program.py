"""Programs: what is launched when, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.program import Launches, Program
from sim.streams import program_seconds
from tests.sampling import examples
from tests.sim.programs import graphs, node, programs


def test_a_kernel_waits_for_the_last_of_the_other_stream_that_it_reads():
    graph = (node(1), node(1, stream="communication"), node(1, stream="communication"), node(1, 0, 1))
    program = Program.launched({3: graph}, Launches(compute=((3, 0), (3, 3)), communication=((3, 2), (3, 1))))
    assert [(k.htask, k.node, k.needs) for k in program.compute] == [(3, graph[0], 0), (3, graph[3], 2)]
    assert [k.needs for k in program.communication] == [0, 0]
    assert (program.compute_s, len(program), program.work_s) == ((1, 1), 4, 4)


@pytest.mark.parametrize(
    ("compute", "communication"),
    [
        (((0, 0),), ()),  # one is missing
        (((0, 0), (0, 0)), ((0, 1),)),  # one is there twice
        (((0, 0), (0, 1)), ()),  # on the wrong stream
        (((0, 0),), ((0, 1), (1, 0))),  # of an hTask that is not there
    ],
    ids=str,
)
def test_orders_of_other_nodes_are_refused(compute, communication):
    graph = (node(1), node(1, 0, stream="communication"))
    with pytest.raises(RuntimeError, match="every node once, on its stream"):
        Program.launched({0: graph}, Launches(compute=compute, communication=communication))


def test_a_launch_before_its_input_is_refused():
    order = Launches(compute=((0, 1), (0, 0)), communication=())
    with pytest.raises(RuntimeError, match="launched before what it reads"):
        Program.launched({0: (node(1), node(1, 0))}, order)


def test_streams_that_wait_for_each_other_are_refused():
    # On both streams the one that waits is launched first.
    one = (node(1), node(1, 0, stream="communication"))
    other = (node(1, stream="communication"), node(1, 0))
    order = Launches(compute=((1, 1), (0, 0)), communication=((0, 1), (1, 0)))
    with pytest.raises(RuntimeError, match="deadlocks"):
        Program.launched({0: one, 1: other}, order)


@given(st.lists(graphs(), min_size=1, max_size=3))
@settings(max_examples=examples(100))
def test_nothing_overlaps_in_turn(found):
    program = Program.in_turn(enumerate(found))
    assert program_seconds(program, contention=7.0) == pytest.approx(program.work_s, rel=1e-12)


@given(programs(), programs())
@settings(max_examples=examples(100))
def test_what_comes_then_waits_for_everything(first, second):
    both = first.then(second)
    expected = program_seconds(first, 0.5) + program_seconds(second, 0.5)
    assert program_seconds(both, 0.5) == pytest.approx(expected, rel=1e-12)
    assert len(both) == len(first) + len(second)
