"""Programs of an orchestrated clock take the time that its schedule says, node by node."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.graph import StageGraph
from muxtune.orchestration import MODES, launch_graph, schedule_clock
from sim.orchestrated import orchestrated_program
from sim.streams import program_seconds
from tests.sampling import examples
from tests.sim.programs import graphs


@given(
    st.lists(st.tuples(graphs(), st.integers(1, 3)), min_size=1, max_size=3),
    st.sampled_from(MODES),
    st.sampled_from([0.0, 0.25, 1.5]),
)
@settings(max_examples=examples(300))
def test_the_engine_takes_as_long_as_the_schedule_of_the_clock(parts, mode, contention):
    found = [StageGraph(((nodes, repeats),)) for nodes, repeats in parts]
    cuts = [launch_graph(graph) for graph in found]
    schedule = schedule_clock(cuts, mode, contention)
    program = orchestrated_program(
        schedule, [each.cut for each in cuts], [graph.expand() for graph in found], range(len(found))
    )
    assert len(program) == sum(len(nodes) * repeats for nodes, repeats in parts)
    assert program_seconds(program, contention) == pytest.approx(schedule.seconds, rel=1e-9, abs=1e-12)
