"""What a stage really sums over its ranks, against the graph that the plan's launch order is made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from muxtune.orchestration import action_cut
from muxtune.orchestration.subgraphs import COMMUNICATION
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard
from runtime.distributed.teams import StageTeam
from tests.runtime.backbone.test_sharded_stage import SPECS
from tests.runtime.worlds import lay_out, make_task, make_tenant

TARGETS = {
    "llama": [("all-linear",), ("q_proj",), ("down_proj",), ("o_proj", "gate_proj")],
    "gpt2": [("all-linear",), ("c_attn",), ("mlp.c_proj",)],
    "opt": [("all-linear",), ("v_proj", "fc1"), ("fc2",)],
}


weights_of = cache(load_hf_model)


class Alone:
    """A team of which one rank is looked at; what it sums does not matter."""

    def launch(self, tensor: Tensor, op: object) -> Callable[[], None]:
        return lambda: None


@pytest.mark.parametrize(
    ("family", "targets"), [(f, t) for f, each in TARGETS.items() for t in each], ids=str
)
@pytest.mark.parametrize("layers", [range(4), range(1), range(1, 3), range(3, 4)], ids=str)
def test_an_action_pauses_as_often_as_its_graph_has_collectives(family, targets, layers, tmp_path):
    spec = SPECS[family]
    first, last = layers.start == 0, layers.stop == spec.layers
    tenant = make_tenant(spec, make_task("a", targets=targets), [5, 9], tmp_path)
    team = StageTeam(Alone())
    stage = Stage(spec, layers, first=first, last=last, weights=weights_of(spec), shard=Shard(0, 2, team))
    stage.add_task(tenant.task, tenant.adapter)
    batch = build_microbatch(lay_out([tenant], "pack"), [tenant.examples], task_ids=["a"])
    hidden_TD = None
    if not first:
        hidden_TD = torch.randn(len(batch.tokens_T), spec.hidden, dtype=torch.float64, requires_grad=True)

    pauses = []
    team.pause = lambda: pauses.append(None)
    output = stage.forward(batch, hidden_TD)
    forward = len(pauses)
    output.sum().backward()
    found = {"fwd": forward, "bwd": len(pauses) - forward}

    for phase, count in found.items():
        cut = action_cut(
            spec,
            len(layers),
            first=first,
            last=last,
            pefts=(tenant.task.peft,),
            tokens=len(batch.tokens_T),
            phase=phase,
            tp=2,
        )
        assert count == cut.streams.count(COMMUNICATION), phase
