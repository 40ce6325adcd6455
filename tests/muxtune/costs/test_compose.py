"""Composition of a stage: which operators an action consists of, counted by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from muxtune.costs import MicrobatchWork, p2p_seconds, stage_operators, step_seconds
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import PHASES, Operator
from muxtune.model import PRESETS
from muxtune.peft.lora import LoraSpec
from muxtune.placement import Route
from tests.muxtune.costs.actions import layer_operators, stage_seconds
from tests.muxtune.graph.works import first_depth

LLAMA, GPT2, OPT = PRESETS["llama-tiny"], PRESETS["gpt2-tiny"], PRESETS["opt-tiny"]


def lora(*targets, r=8):
    return LoraSpec(method="lora", r=r, alpha=16, targets=targets)


def work(*pefts, attention=((1.0, 4, 50),), targets=30.0):
    return MicrobatchWork(
        tokens=100 * len(pefts),
        task_tokens=(100,) * len(pefts),
        pefts=pefts,
        attention=attention,
        targets=targets,
    )


class OneSecondEach:
    """Every operator takes a second; actions take one more."""

    ref = CostsRef(profile_id="one", device="cpu", digest="")

    def latency_s(self, op, phase):
        return 1.0

    def action_s(self, operators_s, phase):
        return operators_s + 1.0


def counts(weighted):
    total = Counter()
    for op, count in weighted:
        total[op.kind] += count
    return dict(total)


def test_a_llama_layer():
    weighted = layer_operators(LLAMA, work(lora("q_proj", "v_proj"), lora("all-linear", r=4)), "fwd")
    assert counts(weighted) == {"norm": 2, "linear": 4, "attention": 1, "activation": 1, "lora": 9}
    by_op = dict(weighted)
    assert by_op[Operator("linear", (256, 512, 200))] == 1  # q, k, v as one
    assert by_op[Operator("linear", (256, 256, 200))] == 1  # o
    assert by_op[Operator("linear", (256, 1376, 200))] == 1  # gate, up
    assert by_op[Operator("linear", (688, 256, 200))] == 1  # down
    assert by_op[Operator("lora", (256, 256, 8, 100))] == 1
    assert by_op[Operator("lora", (256, 688, 4, 100))] == 2


def test_a_gpt2_layer():
    weighted = layer_operators(GPT2, work(lora("c_attn")), "bwd")
    assert counts(weighted) == {"norm": 2, "linear": 4, "attention": 1, "activation": 1, "lora": 1}


def test_an_opt_layer():
    weighted = layer_operators(OPT, work(lora("q_proj", "v_proj", "fc1"), lora("all-linear", r=4)), "fwd")
    assert counts(weighted) == {"norm": 2, "linear": 4, "attention": 1, "activation": 1, "lora": 9}
    by_op = dict(weighted)
    assert by_op[Operator("linear", (256, 768, 200))] == 1  # q, k, v as one
    assert by_op[Operator("linear", (256, 256, 200))] == 1  # out
    assert by_op[Operator("linear", (256, 1024, 200))] == 1  # fc1
    assert by_op[Operator("linear", (1024, 256, 200))] == 1  # fc2
    assert by_op[Operator("lora", (256, 256, 8, 100))] == 2
    assert by_op[Operator("lora", (256, 256, 4, 100))] == 4


@pytest.mark.parametrize(
    ("model", "pefts", "left"),
    [
        # q and v adapted: the first norm and the product of q, k, v are left out
        (LLAMA, [lora("q_proj", "v_proj")], "norm 1 linear 3 attention 1 activation 1 lora 2"),
        (GPT2, [lora("c_attn")], "norm 1 linear 3 attention 1 activation 1 lora 1"),
        # o adapted: attention too
        (LLAMA, [lora("o_proj")], "norm 1 linear 2 activation 1 lora 1"),
        (OPT, [lora("out_proj")], "norm 1 linear 2 activation 1 lora 1"),
        (OPT, [lora("fc1")], "linear 1 activation 1 lora 1"),
        (OPT, [lora("fc2")], "lora 1"),
        # only the MLP's output: no frozen operator of the layer
        (LLAMA, [lora("down_proj")], "lora 1"),
        # the earliest adapter of any task counts
        (LLAMA, [lora("down_proj"), lora("up_proj")], "linear 1 activation 1 lora 2"),
    ],
)
def test_the_first_backward_of_all_stops_at_the_first_adapter(model, pefts, left):
    words = left.split()
    expected = {kind: int(count) for kind, count in zip(words[::2], words[1::2], strict=True)}
    assert counts(layer_operators(model, work(*pefts), "bwd", trained=first_depth(model, *pefts))) == expected


def test_the_forward_has_no_input_gradient_to_save():
    micro = work(lora("down_proj"))
    whole = layer_operators(LLAMA, micro, "fwd")
    assert layer_operators(LLAMA, micro, "fwd", trained=first_depth(LLAMA, *micro.pefts)) == whole


def test_stages_have_embedding_and_head_where_they_belong():
    micro = work(lora("q_proj"))
    only = counts(stage_operators(LLAMA, 1, first=True, last=True, work=micro, phase="fwd"))
    assert (only["embedding"], only["head"], only["linear"]) == (1, 1, 4)
    middle = counts(stage_operators(LLAMA, 3, first=False, last=False, work=micro, phase="bwd"))
    assert middle == {"norm": 6, "linear": 12, "attention": 3, "activation": 3, "lora": 3}
    first = counts(stage_operators(LLAMA, 3, first=True, last=False, work=micro, phase="bwd"))
    assert first == {"norm": 5, "linear": 11, "attention": 3, "activation": 3, "lora": 3}


def test_averages_are_shares_of_whole_sizes():
    micro = work(lora("q_proj"), attention=((0.75, 2, 64), (1.5, 3, 16)), targets=10.5)
    weighted = stage_operators(LLAMA, 2, first=False, last=True, work=micro, phase="fwd")
    attention = {op.dims: count for op, count in weighted if op.kind == "attention"}
    assert attention == {(2, 64): 1.5, (3, 16): 3.0}
    assert {op.dims: count for op, count in weighted if op.kind == "head"} == {(10,): 0.5, (11,): 0.5}


def test_seconds_are_the_sum_and_the_action():
    micro = work(lora("q_proj"))
    seconds = stage_seconds(OneSecondEach(), LLAMA, 2, first=False, last=False, work=micro, phase="fwd")
    # Norms, linears, attention, activation and an adapter in each layer; then feed, action, two messages.
    assert seconds == 2 * (2 + 4 + 1 + 1 + 1) + 1 + 1 + 2


@pytest.mark.parametrize(
    ("first", "last", "neighbours"), [(True, False, 1), (False, True, 1), (True, True, 0)]
)
def test_messages_cost_where_there_is_a_neighbour(first, last, neighbours):
    class Messages(OneSecondEach):
        def latency_s(self, op, phase):
            assert phase == "fwd" or op.kind != "message"
            return 1.0 if op == Operator("message", (100 * LLAMA.hidden * 4,)) else 0.0

        def action_s(self, operators_s, phase):
            return operators_s

    micro = work(lora("q_proj"))
    for phase in PHASES:
        seconds = stage_seconds(Messages(), LLAMA, 2, first=first, last=last, work=micro, phase=phase)
        assert seconds == neighbours


def test_the_feed_handles_all_sequences_and_only_forward():
    micro = replace(work(lora("q_proj")), attention=((1.0, 2, 16), (0.5, 3, 32)))
    for phase, expected in (("fwd", {(3,): 0.5, (4,): 0.5}), ("bwd", {})):
        weighted = stage_operators(LLAMA, 2, first=False, last=False, work=micro, phase=phase)
        assert {op.dims: count for op, count in weighted if op.kind == "feed"} == expected


def test_optimizer_and_transfer_sizes():
    asked = []

    class Recording(OneSecondEach):
        def latency_s(self, op, phase):
            asked.append(op)
            return 1.0

    pair = Route((2,), paired=True)
    step_seconds(Recording(), LLAMA, 4, lora("q_proj", "v_proj"))
    p2p_seconds(Recording(), LLAMA, 100, [pair])
    parameters = 4 * 8 * (256 + 256 + 256 + 128)
    assert asked == [Operator("optimizer", (16, parameters)), Operator("p2p", (100 * 256 * 4,), pair)]
