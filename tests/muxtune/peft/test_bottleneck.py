"""Bottleneck adapters in the domain: where they stand, what they cost, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from muxtune.costs.flops import flops_per_token
from muxtune.graph.layer import layer_graph
from muxtune.memory.weights import Sharding, adapter_parameters
from muxtune.peft import Step, attachments, check_peft
from muxtune.peft.bottleneck import BottleneckSpec
from muxtune.peft.sites import depth_of
from muxtune.support.errors import SpecError
from tests.muxtune.graph.works import LLAMA, MODELS, lora, work
from tests.plans import make_task

D = LLAMA.hidden


def spec(**fields) -> BottleneckSpec:
    return BottleneckSpec(method="bottleneck", size=16, **fields)


def test_houlsby_stands_behind_both_blocks_and_pfeiffer_behind_the_mlp():
    paths = {name: [e.site.path for e in attachments(spec(**f), LLAMA)] for name, f in CASES.items()}
    assert paths == {"houlsby": ["attention", "mlp"], "pfeiffer": ["mlp"], "parallel": ["attention", "mlp"]}


CASES = {"houlsby": {}, "pfeiffer": {"blocks": ["mlp"]}, "parallel": {"placement": "parallel"}}


@pytest.mark.parametrize("fields", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_rank_has_all_of_it_with_whole_gradients(model, fields):
    peft = spec(**fields)
    for each in attachments(peft, model.shard(2)):
        assert all((tensor.sharded, tensor.partial) == ("none", False) for tensor in each.tensors)
    blocks = len(peft.blocks)
    counted = [adapter_parameters(model, 3, peft, Sharding(tp=tp)) for tp in (1, 2)]
    assert counted == [3 * blocks * (2 * 16 * model.hidden + 16 + model.hidden)] * 2


def test_a_serial_one_waits_for_the_sum_and_a_parallel_one_for_the_norm_alone():
    nodes = layer_graph(
        LLAMA, work(spec(blocks=["mlp"]), spec(placement="parallel", blocks=["mlp"])), "fwd", tp=2
    )
    kinds = [node.op.kind for node in nodes]
    last_sum = len(kinds) - 1 - kinds[::-1].index("all_reduce")
    by_task = {node.task: node for node in nodes if node.op.kind == "bottleneck"}
    assert by_task[0].deps == (last_sum,)
    (read,) = by_task[1].deps
    assert kinds[read] == "norm"
    assert kinds.count("all_reduce") == 2  # those of the backbone


def test_the_backward_ends_at_the_first_trained_thing():
    peft = spec(blocks=["mlp"], placement="parallel")
    depth = depth_of(3, Step.BLOCK)
    nodes = layer_graph(LLAMA, work(peft), "bwd", trained=depth)
    assert [node.op.kind for node in nodes] == ["bottleneck"]
    forward, backward = (
        flops_per_token(LLAMA, phase, context_tokens=1, peft=peft).adapters for phase in ("fwd", "bwd")
    )
    assert forward == LLAMA.layers * 4 * 16 * D
    assert backward == 2 * forward - 2 * 16 * D  # the first one's input needs no gradient


def test_what_a_serial_one_reads_is_kept_by_itself_and_what_a_parallel_one_reads_with_the_linears_input():
    for placement, keeps, more in (("serial", False, D * 4), ("parallel", True, 0)):
        for each in attachments(spec(placement=placement), LLAMA):
            assert (each.keeps_input, each.kept_bytes) == (keeps, 16 * 4 + more)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": D + 1}, rf"peft\.size = {D + 1}: expected at most {D}, the hidden size of llama-tiny"),
        ({"layers": [9]}, r"peft\.layers = 9: expected layers from 0 to"),
    ],
)
def test_what_the_backbone_cannot_have_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        check_peft(BottleneckSpec.model_validate({"method": "bottleneck", "size": 4} | fields), LLAMA, "peft")


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"placement": "beside"},
        {"blocks": []},
        {"blocks": ["mlp", "mlp"]},
        {"blocks": ["embedding"]},
        {"activation": "swish"},
        {"scale": 0},
        {"r": 8},
    ],
    ids=str,
)
def test_parameters_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        make_task("a", peft={"method": "bottleneck", "size": 4} | fields)


def test_a_plan_file_gives_the_same_task_back():
    task = make_task("a", peft={"method": "bottleneck", "size": 4, "blocks": ["mlp"], "layers": [0, "2-3"]})
    again = type(task).model_validate_json(task.model_dump_json())
    assert again == task
    assert isinstance(again.peft, BottleneckSpec)
    assert again.peft.layers == (0, 2, 3)


def test_lora_and_a_bottleneck_never_share_a_launch():
    nodes = layer_graph(LLAMA, work(spec(), lora("all-linear"), spec()), "fwd")
    assert all(len(node.group) <= 1 for node in nodes if node.op.kind == "bottleneck")
