"""A stage's graph written out."""

from muxtune.graph import Node, StageGraph, stage_graph
from muxtune.graph.operators import Operator
from tests.muxtune.graph.works import LLAMA, behind, lora, work

MICRO = work(lora("q_proj", "v_proj"), lora("all-linear", r=4), lora("down_proj", r=2))


def kinds(graph):
    return [node.op.kind for node in graph.expand()]


def test_a_graph_written_out_has_its_layers_in_a_row():
    graph = stage_graph(LLAMA, 4, first=False, last=False, work=MICRO, phase="bwd", tp=2)
    nodes = graph.expand()
    assert len(nodes) == sum(repeats for _, repeats in graph)
    everything = behind(graph)
    on_the_way = {i for i, node in enumerate(nodes) if not node.leaf}
    assert everything[-1] == on_the_way - {len(nodes) - 1}, "the message waits for all but leaves"
    starts = [i for i, node in enumerate(nodes) if not node.deps]
    assert starts == [0]


def test_a_part_waits_for_what_nobody_reads_in_the_part_before():
    op = Operator("norm", (1,))
    part = (
        Node(op, "base"),
        Node(op, "base", (0,)),
        Node(op, "adapter", (0,)),
        Node(op, "adapter", leaf=True),
    )
    nodes = StageGraph((((), 3), (part, 2))).expand()
    assert [node.deps for node in nodes] == [(), (0,), (0,), (), (1, 2), (4,), (4,), (1, 2)]
