"""Values only: what is launched at once."""

from itertools import groupby

import pytest
from hypothesis import given, settings

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, MicrobatchWork
from muxtune.costs.collectives import interconnect_of
from muxtune.graph import StageGraph, TimedNode, stage_graph, time_graph
from muxtune.model import PRESETS
from muxtune.orchestration import cut
from muxtune.peft.lora import LoraSpec
from tests.muxtune.orchestration.graphs import run_orders, stage_graphs
from tests.sampling import examples

LLAMA = PRESETS["llama2-7b"]


def _sort(node):
    if node.stream == "communication":
        return "communicate"
    return "adapter" if node.role == "adapter" else "compute"


def _ancestors(deps):
    """Of each, all that it waits for."""
    found = []
    for waited in deps:
        found.append(set(waited).union(*(found[dep] for dep in waited)))
    return found


@given(stage_graphs())
def test_subgraphs_part_the_nodes_by_sort_and_keep_what_they_wait_for(graph):
    nodes = graph.expand()
    found = cut(graph).subgraphs
    assert sorted(node for each in found for node in each.nodes) == list(range(len(nodes)))
    assert all({_sort(nodes[node]) for node in each.nodes} == {each.sort} for each in found)
    assert all(dep < number for number, each in enumerate(found) for dep in each.deps)
    place = {node: (number, i) for number, each in enumerate(found) for i, node in enumerate(each.nodes)}
    behind = _ancestors([each.deps for each in found])
    for i, node in enumerate(nodes):
        for dep in node.deps:
            number, (other, _) = place[i][0], place[dep]
            assert (other in behind[number]) if other != number else place[dep] < place[i]
    for each in found:  # and wait for nothing else
        read = {place[dep][0] for node in each.nodes for dep in nodes[node].deps}
        assert set(each.deps) <= read


@given(stage_graphs())
def test_nodes_of_a_subgraph_have_the_same_of_the_other_stream_before_and_after_them(graph):
    nodes = graph.expand()
    before = _ancestors([node.deps for node in nodes])

    def of_others(i, others):
        return {j for j in others if nodes[j].stream != nodes[i].stream}

    after = [{j for j, reached in enumerate(before) if i in reached} for i in range(len(nodes))]
    for each in cut(graph).subgraphs:
        for related in (before, after):
            assert len({frozenset(of_others(i, related[i])) for i in each.nodes}) == 1


@settings(max_examples=examples(60))
@given(stage_graphs(largest=6, most_parts=1, most_repeats=1, streams=("compute",)))
def test_the_two_sorts_of_a_stream_take_turns_as_seldom_as_any_order_allows(graph):
    nodes = graph.expand()
    sorts = ([_sort(nodes[i]) for _, i in order] for order in run_orders([nodes]))
    assert len(cut(graph).subgraphs) == min(len(list(groupby(each))) for each in sorts)


def _llama_graph(phase, *, layers=2, adapters="grouped"):
    pefts = tuple(
        LoraSpec(method="lora", r=r, alpha=16, targets=("q_proj", "v_proj", "o_proj")) for r in (8, 16)
    )
    work = MicrobatchWork(
        tokens=512, task_tokens=(256, 256), pefts=pefts, attention=((1.0, 4, 128),), targets=8.0
    )
    costs = AnalyticCosts("a40", LLAMA, interconnect_of(load_cluster("testbed-a")))
    graph = stage_graph(
        LLAMA, layers, first=False, last=False, work=work, phase=phase, tp=2, adapters=adapters
    )
    return time_graph(graph, costs, phase)


def test_a_forward_layer_is_cut_at_its_adapters_and_all_reduces():
    graph = _llama_graph("fwd")
    labels = [node.label for node in graph.expand()]
    layer = [
        ("compute", ["norm", "linear"]),
        ("adapter", ["lora", "lora"]),
        ("compute", ["attention", "linear"]),
        ("adapter", ["lora"]),
        ("communicate", ["all_reduce"]),
        ("compute", ["norm", "linear", "activation", "linear"]),
        ("communicate", ["all_reduce"]),
    ]
    found = [(each.sort, [labels[node] for node in each.nodes]) for each in cut(graph).subgraphs]
    assert found[1:-1] == (layer * 2)[1:]  # messages join the computing before and after the layers
    assert found[0] == ("compute", ["feed", "message", "norm", "linear"])
    assert found[-1] == ("compute", ["message"])
    assert cut(graph).chained


def test_separate_adapters_are_launched_one_by_one():
    graph = _llama_graph("fwd", adapters="separate")
    nodes = graph.expand()
    adapters = [each for each in cut(graph, "separate").subgraphs if each.sort == "adapter"]
    assert len(adapters) == sum(node.role == "adapter" for node in nodes) == 2 * 2 * 3
    together = [each for each in cut(graph, "grouped").subgraphs if each.sort == "adapter"]
    assert [len(each.nodes) for each in together] == [4, 2] * 2


def test_gradients_of_factors_can_run_beside_a_backward_all_reduce():
    graph = _llama_graph("bwd")
    nodes = graph.expand()
    found = cut(graph).subgraphs
    behind = _ancestors([each.deps for each in found])
    leaves = [i for i, each in enumerate(found) if all(nodes[node].leaf for node in each.nodes)]
    links = [i for i, each in enumerate(found) if each.sort == "communicate"]
    assert leaves
    assert all(i not in behind[link] for i in leaves for link in links)
    assert any(link not in behind[i] for i in leaves for link in links if link > i)


def test_graphs_of_one_shape_share_a_cut():
    graph = StageGraph(((((TimedNode("a", "compute", 1.0)), TimedNode("b", "compute", 2.0, (0,))), 3),))
    slower = StageGraph(((((TimedNode("c", "compute", 5.0)), TimedNode("d", "compute", 6.0, (0,))), 3),))
    assert cut(graph) is cut(slower)
    assert [each.nodes for each in cut(graph).subgraphs] == [tuple(range(6))]


@pytest.mark.parametrize("adapters", ["grouped", "separate"])
def test_a_graph_without_nodes_has_no_subgraphs(adapters):
    assert cut(StageGraph(()), adapters).subgraphs == ()
