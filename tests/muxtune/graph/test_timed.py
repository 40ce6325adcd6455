"""Seconds on a graph are those of its action."""

import pytest

from muxtune.graph import stage_graph, time_graph
from muxtune.graph.operators import PHASES
from tests.muxtune.costs.actions import stage_seconds
from tests.muxtune.graph.works import LLAMA, Rates, behind, lora, work

MICRO = work(lora("q_proj", "v_proj"), lora("all-linear", r=4), lora("down_proj", r=2))


PLACES = [(True, False), (False, False), (False, True), (True, True)]


@pytest.mark.parametrize("adapters", ["grouped", "separate"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("first", "last"), PLACES)
def test_seconds_of_the_nodes_add_up_to_those_of_the_stage(first, last, phase, tp, adapters):
    costs = Rates(LLAMA)
    graph = stage_graph(LLAMA, 3, first=first, last=last, work=MICRO, phase=phase, tp=tp, adapters=adapters)
    timed = time_graph(graph, costs, phase)
    expected = stage_seconds(costs, LLAMA, 3, first=first, last=last, work=MICRO, phase=phase, tp=tp)
    assert sum(node.seconds for node in timed.expand()) == pytest.approx(expected, rel=1e-12)
    assert timed.tp == tp
    with_sizes = len(graph.expand()) - len(timed.expand()) + (phase == "fwd")  # the action's own node
    assert with_sizes >= 3, "sizes that an average mixes are one node"
    behind(timed)
