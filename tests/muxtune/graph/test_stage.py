"""A whole action: its parts, its price, its work, and the graph written out."""

from itertools import product

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, ProfiledCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.compose import ActionPrices
from muxtune.costs.flops import flops_per_token
from muxtune.costs.operator_work import operator_work
from muxtune.graph import Part, stage_graph, time_graph
from muxtune.graph.layer import layer_graph
from muxtune.graph.operators import PHASES, Operator
from muxtune.graph.stage import part_graph
from muxtune.model import PRESETS, load_model_spec
from muxtune.peft import targeted_paths
from tests.muxtune.costs.actions import stage_seconds
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators
from tests.muxtune.graph.works import LLAMA, Rates, lora, work

MICRO = work(lora("q_proj", "v_proj"), lora("all-linear", r=4), lora("down_proj", r=2))
PLACES = [(True, False), (False, False), (False, True), (True, True)]


def kinds(graph):
    return [node.op.kind for node in graph.expand()]


@pytest.mark.parametrize(("first", "last"), PLACES)
def test_an_action_begins_and_ends_where_its_stage_does(first, last):
    forward = kinds(stage_graph(LLAMA, 2, first=first, last=last, work=MICRO, phase="fwd", tp=2))
    begin = ["feed", *(["embedding", "all_reduce"] if first else ["message"])]
    end = ["head"] * 2 + ["all_reduce"] * 2 if last else ["message"]
    assert forward[: len(begin) + 1] == [*begin, "norm"]
    assert forward[-len(end) - 1 :] == ["all_reduce", *end]
    backward = kinds(stage_graph(LLAMA, 2, first=first, last=last, work=MICRO, phase="bwd", tp=2))
    assert backward[: len(end) + 1] == [*end, "lora"]
    assert (backward[-1] == "message") == (not first)
    assert "embedding" not in backward


def test_sums_of_a_whole_backbone():
    """Two per layer and the embedding's; backward none where the first layer's first adapter ends it."""
    micro = work(lora("q_proj"), targets=8)
    for phase, expected in (("fwd", 2 * 4 + 1 + 1), ("bwd", 2 * 4 - 1 + 1)):
        graph = stage_graph(LLAMA, 4, first=True, last=True, work=micro, phase=phase, tp=4)
        sums = [node for node in graph.expand() if node.role == "communication"]
        assert len(sums) == expected
        assert all(node.stream == "communication" and node.op.dims[1] == 4 for node in sums)
    loss = [
        node
        for node in stage_graph(LLAMA, 1, first=False, last=True, work=micro, phase="fwd", tp=4).expand()
        if node.role == "communication"
    ][-1]
    assert (loss.op.dims, loss.count) == ((8 * 6, 4), 2.0)  # three numbers per target, in two calls


@pytest.mark.parametrize("phase", PHASES)
def test_ranks_meet_for_the_loss_also_where_nothing_is_predicted(phase):
    def count(targets):
        micro = work(lora("q_proj"), targets=targets)
        graph = stage_graph(LLAMA, 1, first=False, last=True, work=micro, phase=phase, tp=2)
        return sum(node.role == "communication" for node in graph.expand())

    assert count(0) == count(8)


def plain_seconds(costs, model, layers, *, first, last, micro, phase):
    """The same without a graph, for one rank, counted operator by operator."""

    def price(kind, *dims, times=1.0):
        where = phase if kind in {"linear", "lora", "attention", "norm", "activation", "head"} else "fwd"
        return times * costs.latency_s(Operator(kind, dims), where)

    def adapted(adapter):
        return [linear for linear in model.linears if linear.name in targeted_paths(adapter, model)[0]]

    def mixed(kind, amount):
        below = int(amount)
        sizes = ((below, 1 - amount + below), (below + 1, amount - below))
        return sum(price(kind, size, times=share) for size, share in sizes if size and share)

    def layer(starting_after):
        seconds = 0.0
        for block, name in enumerate(("attention", "attended", "mlp", "inner")):
            if block > starting_after:
                linears = [linear for linear in model.linears if linear.reads == name]
                widths = linears[0].in_features, sum(linear.out_features for linear in linears)
                seconds += price("linear", *widths, micro.tokens)
                if name in {"attention", "mlp"}:
                    seconds += price("norm", micro.tokens)
                elif name == "inner":
                    seconds += price("activation", micro.tokens)
                else:
                    seconds += sum(price("attention", s, n, times=calls) for calls, s, n in micro.attention)
        for adapter, tokens in zip(micro.pefts, micro.task_tokens, strict=True):
            for linear in adapted(adapter):
                seconds += price("lora", linear.in_features, linear.out_features, adapter.r, tokens)
        return seconds

    blocks = [linear.block for adapter in micro.pefts for linear in adapted(adapter)]
    whole = layers - (first and phase == "bwd")
    seconds = whole * layer(-1) + (layers - whole) * layer(min(blocks))
    if phase == "fwd":
        seconds += mixed("feed", sum(calls * s for calls, s, _ in micro.attention))
        seconds += price("embedding", micro.tokens) if first else 0.0
    if last:
        seconds += mixed("head", micro.targets)
    messages = (not first) + (not last)
    message_s = price("message", micro.tokens * model.hidden * model.dtype_bytes, times=messages)
    return costs.action_s(seconds, phase) + message_s


def made_up_profile():
    law = analytic_law()
    return ProfiledCosts(
        make_profile(lambda op, phase: law(op, phase) * (1 + op.dims[0] % 7), operators()), LLAMA
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("first", "last"), PLACES)
def test_without_tensor_parallelism_a_stage_costs_what_its_operators_add_up_to(first, last, phase):
    for costs in (Rates(LLAMA), made_up_profile()):
        with costs.exploring():
            expected = plain_seconds(costs, LLAMA, 3, first=first, last=last, micro=MICRO, phase=phase)
            seconds = stage_seconds(costs, LLAMA, 3, first=first, last=last, work=MICRO, phase=phase)
            assert seconds == pytest.approx(expected, rel=1e-12)


def test_parts_that_were_priced_serve_every_stage():
    costs = Rates(LLAMA)
    for phase, tp in product(PHASES, (1, 2)):
        prices = ActionPrices(costs, LLAMA, MICRO, phase, tp=tp)
        for layers, (first, last) in product((1, 2, 5), PLACES):
            expected = stage_seconds(
                costs, LLAMA, layers, first=first, last=last, work=MICRO, phase=phase, tp=tp
            )
            assert prices.seconds(layers, first=first, last=last) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["gpt3-2.7b", "llama2-7b", "opt-30b"])
def test_the_work_of_all_ranks_is_that_of_the_whole(name, tp):
    model, adapter, length = load_model_spec(name), lora("all-linear", r=16), 64
    micro = work(
        adapter, tokens=4 * length, task_tokens=(4 * length,), attention=((1.0, 4, length),), targets=20
    )
    graph = stage_graph(model, model.layers, first=True, last=True, work=micro, phase="fwd", tp=tp)
    shard = model.shard(tp)
    flops = dict.fromkeys(("linear", "lora", "attention", "head"), 0.0)
    for node, repeats in graph:
        if node.op.kind in flops:
            flops[node.op.kind] += tp * repeats * node.count * operator_work(node.op, "fwd", shard).flops
    per_token = flops_per_token(
        model,
        "fwd",
        context_tokens=(length + 1) / 2,
        peft=adapter,
        targets_per_token=20 / micro.tokens,
    )
    assert flops["linear"] == pytest.approx(per_token.linears * micro.tokens, rel=1e-12)
    assert flops["attention"] == pytest.approx(per_token.attention * micro.tokens, rel=1e-12)
    # A vocabulary that does not divide is rounded up.
    assert flops["head"] == pytest.approx(
        per_token.head * micro.tokens * tp * shard.vocab / model.vocab, rel=1e-12
    )
    # The factor that is not split is multiplied on every rank.
    whole = sum(
        linear.in_features if linear.split_by_outputs else linear.out_features for linear in model.linears
    )
    again = (tp - 1) * model.layers * 2 * adapter.r * whole * micro.tokens
    assert flops["lora"] == pytest.approx(per_token.adapters * micro.tokens + again, rel=1e-12)


@pytest.mark.parametrize("device", ["a40", "h100"])
def test_more_ranks_compute_less_each_and_communicate_more(device):
    model, cluster = PRESETS["llama2-7b"], load_cluster("testbed-a" if device == "a40" else "testbed-c")
    costs = AnalyticCosts(device, model, interconnect_of(cluster))
    pefts = [lora("all-linear", r=16)] * 4
    micro = work(*pefts, tokens=4096, task_tokens=(1024,) * 4, attention=((1.0, 16, 256),))
    for phase in PHASES:
        computing, communicating = [], []
        for tp in (1, 2, 4):
            graph = stage_graph(model, 8, first=False, last=False, work=micro, phase=phase, tp=tp)
            nodes = time_graph(graph, costs, phase).expand()
            by_stream = {"compute": 0.0, "communication": 0.0}
            for node in nodes:
                by_stream[node.stream] += node.seconds
            computing.append(by_stream["compute"])
            communicating.append(by_stream["communication"])
        assert computing[0] > 1.5 * computing[1] > 1.5 * 1.5 * computing[2]
        assert 0 == communicating[0] < communicating[1] < communicating[2]


def test_sequences_from_earlier_micro_batches_attend_to_their_carried_keys():
    plain = work(lora("all-linear"))
    carrying = work(lora("all-linear"), carried_attention=((0.5, 2, 16, 48),), attention=())
    assert carrying.sequences == 1.0
    layer = layer_graph(LLAMA, carrying, "fwd")
    (node,) = [node for node in layer if node.op.kind == "carried_attention"]
    assert (node.op.dims, node.count) == ((2, 16, 48), 0.5)
    assert len(layer) == len(layer_graph(LLAMA, plain, "fwd")) - 1
    (feed,) = part_graph(Part("feed"), LLAMA, carrying, "fwd")
    assert (feed.op.dims, feed.count) == ((1,), 1.0)
