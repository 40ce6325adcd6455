"""Optimizer step of a task: sums over ranks, then the optimizer."""

import pytest

from muxtune.costs import step_seconds
from muxtune.graph import step_graph
from muxtune.graph.operators import Operator
from muxtune.placement import Route
from tests.muxtune.graph.works import GPT2, Rates, lora, work

MICRO = work(lora("q_proj", "v_proj"), lora("all-linear", r=4), lora("down_proj", r=2))


def kinds(graph):
    return [node.op.kind for node in graph.expand()]


def test_a_step_sums_whole_factors_over_ranks_and_everything_over_replicas():
    adapter = lora("c_attn", "c_fc", "mlp.c_proj")
    spread = Route((2, 2), paired=False)
    graph = step_graph(GPT2, 3, adapter, tp=2, replicas=spread)
    elements = 3 * 8 * ((256 + 384) + (256 + 512) + (512 + 256))
    assert [node.op for node in graph.expand()] == [
        Operator("all_reduce", (4 * 3 * 8 * (256 + 256 + 256), 2)),
        Operator("all_reduce", (4 * elements, 4), spread),
        Operator("optimizer", (2 * 3 * 3, elements)),
    ]
    assert [node.deps for node in graph.expand()] == [(), (0,), (1,)]
    costs = Rates(GPT2)
    expected = sum(costs.latency_s(node.op, "fwd") for node in graph.expand())
    assert step_seconds(costs, GPT2, 3, adapter, tp=2, replicas=[spread]) == pytest.approx(
        expected, rel=1e-12
    )
    assert [node.op.kind for node in step_graph(GPT2, 3, adapter).expand()] == ["optimizer"]
