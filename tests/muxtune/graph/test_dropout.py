"""Dropout in the graph of a layer: an operator beside each adapter that has it, and none elsewhere."""

from __future__ import annotations

from itertools import product

import pytest

from muxtune.graph import StageGraph, layer_graph, step_graph
from muxtune.graph.operators import Operator
from tests.muxtune.costs.actions import stage_seconds
from tests.muxtune.graph.works import LLAMA, MODELS, Rates, behind, first_depth, lora, work


def dropping(*targets: str, r: int = 8):
    return lora(*targets, r=r).model_copy(update={"dropout": 0.1})


BOTH = work(dropping("q_proj", "down_proj"), lora("q_proj", "o_proj"), lora("q_proj", r=4))


def of_kind(nodes, kind):
    return [i for i, node in enumerate(nodes) if node.op.kind == kind]


@pytest.mark.parametrize(("tp", "phase"), list(product((1, 2), ("fwd", "bwd"))))
def test_every_masked_adapter_has_one_of_its_inputs_width(tp, phase):
    nodes = layer_graph(LLAMA, BOTH, phase, tp=tp)
    found = sorted(nodes[i].op.dims for i in of_kind(nodes, "dropout"))
    assert found == [(256, 100), (688 // tp, 100)]
    assert all(
        (node.task, node.role, node.count) == (0, "adapter", 1.0)
        for node in nodes
        if node.op.kind == "dropout"
    )


@pytest.mark.parametrize(("tp", "phase"), list(product((1, 2), ("fwd", "bwd"))))
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_without_dropout_nothing_changes(model, tp, phase):
    plain = layer_graph(model, work(lora("all-linear"), lora("all-linear", r=4)), phase, tp=tp)
    masked = layer_graph(model, work(dropping("all-linear"), lora("all-linear", r=4)), phase, tp=tp)
    assert not of_kind(plain, "dropout")
    assert len(of_kind(masked, "dropout")) == len(model.linears)

    def counts(nodes):
        found = {}
        for node in nodes:
            for op in node.operators:
                found[op] = found.get(op, 0.0) + node.count
        return {op: n for op, n in found.items() if op.kind != "dropout"}

    assert counts(masked) == counts(plain)


def test_adapters_with_dropout_share_no_launch():
    nodes = layer_graph(LLAMA, BOTH, "fwd")
    queries = [node for node in nodes if node.op.kind == "lora" and node.op.dims[:2] == (256, 256)]
    assert [(len(node.operators), node.task) for node in queries[:2]] == [(2, None), (1, 0)]


@pytest.mark.parametrize("adapters", ["grouped", "separate"])
def test_forward_it_stands_before_its_adapter(adapters):
    nodes = layer_graph(LLAMA, BOTH, "fwd", adapters=adapters)
    everything = behind(StageGraph(((nodes, 1),)))
    for i in of_kind(nodes, "dropout"):
        (own,) = (
            j
            for j in of_kind(nodes, "lora")
            if (nodes[j].task, nodes[j].op.dims[0]) == (0, nodes[i].op.dims[0])
        )
        assert i in everything[own]


@pytest.mark.parametrize("adapters", ["grouped", "separate"])
@pytest.mark.parametrize("tp", [1, 2])
def test_backward_it_goes_on_with_the_inputs_gradient(adapters, tp):
    nodes = layer_graph(LLAMA, BOTH, "bwd", tp=tp, adapters=adapters)
    everything = behind(StageGraph(((nodes, 1),)))
    leaves = {i for i, node in enumerate(nodes) if node.leaf}
    for i in of_kind(nodes, "dropout"):
        assert everything[i] & set(of_kind(nodes, "lora"))
        assert any(i in waited for waited in everything), "the operator before waits for it"
        assert not nodes[i].leaf
    assert not any(leaves & waited for waited in everything)
    assert sum(nodes[i].count * len(nodes[i].operators) for i in of_kind(nodes, "lora")) == 5
    for i in leaves:
        (half,) = nodes[i].deps
        assert (nodes[half].operators, nodes[half].task) == (nodes[i].operators, nodes[i].task)


@pytest.mark.parametrize("tp", [1, 2])
def test_in_the_first_block_of_all_nobody_waits_for_it(tp):
    nodes = layer_graph(
        LLAMA, work(dropping("down_proj")), "bwd", tp=tp, trained=first_depth(LLAMA, dropping("down_proj"))
    )
    assert [node.op.kind for node in nodes if node.op.kind != "all_reduce"] == ["lora", "dropout"]
    assert nodes[-1].leaf == (tp > 1)


def test_a_stage_takes_as_much_longer_as_its_dropouts():
    costs, layers = Rates(LLAMA), 3
    for phase in ("fwd", "bwd"):
        without, masked = (
            stage_seconds(costs, LLAMA, layers, first=False, last=False, work=work(each), phase=phase)
            for each in (lora("q_proj"), dropping("q_proj"))
        )
        more = layers * costs.latency_s(Operator("dropout", (256, 100)), phase)
        assert masked - without == pytest.approx(more, rel=1e-9)


def test_the_optimizer_step_is_the_same():
    assert step_graph(LLAMA, 2, dropping("q_proj")) == step_graph(LLAMA, 2, lora("q_proj"))
