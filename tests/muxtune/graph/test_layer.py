"""One layer: which operators, how they are split, where ranks communicate, and who waits for whom."""

from collections import Counter

import pytest

from muxtune.graph import StageGraph, layer_graph
from muxtune.graph.operators import PHASES
from muxtune.model import PRESETS
from muxtune.support.errors import SpecError
from tests.muxtune.graph.works import GPT2, LLAMA, MODELS, OPT, behind, first_depth, lora, work

BOTH = work(lora("q_proj", "v_proj"), lora("all-linear", r=4))


def kinds(nodes):
    return [node.op.kind for node in nodes]


def of_kind(nodes, kind):
    return [node.op.dims for node in nodes if node.op.kind == kind]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_linears_of_a_llama_layer_are_split_by_heads_and_by_the_width_of_the_mlp(tp):
    nodes = layer_graph(LLAMA, BOTH, "fwd", tp=tp)
    kv = 32 * max(1, 4 // tp)  # four heads of keys and values, which eight ranks repeat
    assert of_kind(nodes, "linear") == [
        (256, 256 // tp + 2 * kv, 200),
        (256 // tp, 256, 200),
        (256, 2 * 688 // tp, 200),
        (688 // tp, 256, 200),
    ]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_other_families_are_split_alike(tp):
    for model, target in ((GPT2, "c_attn"), (OPT, "fc1")):
        nodes = layer_graph(model, work(lora(target)), "fwd", tp=tp)
        assert of_kind(nodes, "linear") == [
            (256, 768 // tp, 100),
            (256 // tp, 256, 100),
            (256, 1024 // tp, 100),
            (1024 // tp, 256, 100),
        ]


def test_a_pair_has_one_factor_split_and_one_whole():
    nodes = layer_graph(GPT2, work(lora("all-linear", r=4)), "fwd", tp=2)
    assert of_kind(nodes, "lora") == [
        (256, 384, 4, 100),  # A whole, B split
        (128, 256, 4, 100),  # A split, B whole
        (256, 512, 4, 100),
        (512, 256, 4, 100),
    ]


def test_heads_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(
        SpecError, match=r"parallelism.tp = 3: expected a divisor of 8, the heads of llama-tiny"
    ):
        layer_graph(LLAMA, BOTH, "fwd", tp=3)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_two_sums_of_the_hidden_states_in_each_phase(model, tp):
    micro = work(lora("all-linear"))
    sums = {
        phase: [node for node in layer_graph(model, micro, phase, tp=tp) if node.role == "communication"]
        for phase in PHASES
    }
    for nodes in sums.values():
        assert [(node.op.dims, node.stream) for node in nodes] == [((100 * 256 * 4, tp), "communication")] * 2
    for phase in PHASES:
        assert "all_reduce" not in kinds(layer_graph(model, micro, phase))


def test_forward_sums_follow_attention_and_mlp_and_backward_sums_come_before_the_norms():
    micro = work(lora("q_proj"))
    assert [kind for kind in kinds(layer_graph(LLAMA, micro, "fwd", tp=2)) if kind != "lora"] == (
        "norm linear attention attention linear all_reduce norm linear activation linear all_reduce".split()
    )
    assert [kind for kind in kinds(layer_graph(LLAMA, micro, "bwd", tp=2)) if kind != "lora"] == (
        "linear activation linear all_reduce norm linear attention attention linear all_reduce norm".split()
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_an_adapter_waits_for_what_its_linear_reads_and_the_next_for_both(phase, tp):
    nodes = layer_graph(LLAMA, BOTH, phase, tp=tp, adapters="separate")
    everything = behind(StageGraph(((nodes, 1),)))
    products = [i for i, node in enumerate(nodes) if node.op.kind == "linear"]
    for i, node in enumerate(nodes):
        if node.role != "adapter" or node.leaf:
            continue
        beside = [p for p in products if nodes[p].deps == node.deps]
        assert len(beside) == 1, "one linear reads the same"
        following = [j for j in range(len(nodes)) if beside[0] in nodes[j].deps]
        assert all(i in nodes[j].deps for j in following)
        if following:
            assert i not in everything[beside[0]]
    on_the_way = [i for i, node in enumerate(nodes) if not node.leaf]
    ends = set(on_the_way) - {dep for node in nodes for dep in node.deps}
    reached = ends.union(*(everything[end] for end in ends))
    assert set(on_the_way) == reached, "nothing but leaves is left out"


def test_each_task_has_an_adapter_of_its_own_or_a_place_in_a_launch():
    separate = layer_graph(LLAMA, BOTH, "fwd", adapters="separate")
    tasks = [node.task for node in separate if node.role == "adapter"]
    assert tasks == [0, 1, 1, 0, 1, 1, 1, 1, 1]  # q, k, v, o, gate, up, down
    grouped = [node for node in layer_graph(LLAMA, BOTH, "fwd") if node.role == "adapter"]
    assert [len(node.operators) for node in grouped] == [2, 1, 2, 1, 1, 1, 1]
    assert [node.task for node in grouped] == [None, 1, None, 1, 1, 1, 1]
    assert Counter(op for node in grouped for op in node.operators) == Counter(
        node.op for node in separate if node.role == "adapter"
    )


@pytest.mark.parametrize("adapters", ["grouped", "separate"])
def test_gradients_of_factors_run_beside_communication(adapters):
    nodes = layer_graph(LLAMA, BOTH, "bwd", tp=2, adapters=adapters)
    everything = behind(StageGraph(((nodes, 1),)))
    leaves = [i for i, node in enumerate(nodes) if node.leaf]
    assert sum(nodes[i].count * len(nodes[i].operators) for i in leaves) == 9 / 2
    assert not any(set(leaves) & waited for waited in everything)
    for i in leaves:
        (half,) = nodes[i].deps
        assert (nodes[half].operators, nodes[half].task) == (nodes[i].operators, nodes[i].task)
    first_sum = kinds(nodes).index("all_reduce")
    assert any(first_sum not in everything[i] for i in leaves)
    whole = layer_graph(LLAMA, BOTH, "bwd", tp=1, adapters=adapters)
    assert not any(node.leaf for node in whole)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("target", "left"),
    [
        ("q_proj", "lora linear linear linear activation attention norm"),
        ("o_proj", "lora linear linear activation norm"),
        ("gate_proj", "lora linear activation"),
        ("down_proj", "lora"),
    ],
)
def test_the_backward_of_the_first_layer_stops_at_its_first_adapter(target, left, tp):
    micro = work(lora(target), attention=((1.0, 4, 25),))
    nodes = layer_graph(LLAMA, micro, "bwd", tp=tp, trained=first_depth(LLAMA, *micro.pefts))
    assert sorted(kind for kind in kinds(nodes) if kind != "all_reduce") == sorted(left.split())
    sums = 0 if tp == 1 or target in {"gate_proj", "down_proj"} else 1  # only before the second norm
    assert kinds(nodes).count("all_reduce") == sums
    adapter = nodes[kinds(nodes).index("lora")]
    assert (adapter.count, adapter.leaf) == (1.0, tp > 1)


@pytest.mark.parametrize("name", PRESETS)
def test_widths_round_up_where_they_do_not_divide(name):
    model = PRESETS[name]
    shard = model.shard(2)
    assert shard is model.shard(2)
    assert model.shard(1) == model
    assert (shard.heads * 2, shard.hidden, shard.head_dim) == (model.heads, model.hidden, model.head_dim)
    assert shard.vocab == -(-model.vocab // 2)
    assert shard.ffn == -(-model.ffn // 2)
