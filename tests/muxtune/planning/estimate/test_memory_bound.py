"""What surely suffices for a group, against what the memory model says of its fullest micro-batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from muxtune.cluster import load_cluster
from muxtune.memory.saved_activations import kept_bytes
from muxtune.memory.weights import Sharding
from muxtune.memory.workspace import backward_workspace_bytes, forward_workspace_bytes
from muxtune.model import load_model_spec
from muxtune.peft import stages_layers
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.estimate.group_seconds import GroupBands, price_groups
from muxtune.planning.estimate.memory_bound import room_for_groups
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.exact.works import sample_works
from muxtune.planning.problem.layouts import sort_by_tokens
from muxtune.planning.problem.meshes import MeshShape
from muxtune.planning.problem.problem import PlanningProblem
from tests.muxtune.planning.problems import FakeCosts, make_workload

METHODS = {
    "lora": {"method": "lora", "r": 64, "alpha": 16, "targets": ["all-linear"]},
    "dora": {"method": "lora", "r": 8, "alpha": 16, "targets": ["all-linear"], "use_dora": True},
    "dropped dora": {
        **{"method": "lora", "r": 8, "alpha": 16, "targets": ["all-linear"], "use_dora": True},
        "dropout": 0.1,
    },
    "ia3": {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    "shira": {"method": "shira", "r": 8, "targets": ["all-linear"]},
    "serial": {"method": "bottleneck", "size": 64},
    "parallel": {"method": "bottleneck", "size": 64, "placement": "parallel"},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 64},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 16},
}


def rooms(methods: list[str], dtype: str, mesh: Mesh):
    """Bounds of all groups, and a function for what the memory model says of one."""
    tasks = [
        {"peft": METHODS[name], "dataset": {"lengths": length}, "max_length": 128}
        for name, length in zip(methods, ("sst2", "rte", "openbookqa") * len(methods), strict=False)
    ]
    model = load_model_spec("llama-tiny").model_copy(update={"dtype": dtype})
    cluster = load_cluster(f"cpu-{mesh.pp * mesh.tp}")
    problem = PlanningProblem(make_workload(tasks), model, cluster, FakeCosts())
    order = sort_by_tokens(problem)
    bands = GroupBands(problem, order, len(order), [("pack", None)])
    prices = StagePrices(problem.costs, model, mesh.tp, bands.most_tokens, DEFAULT_SETTINGS.curve_points)
    prices = prices.between(bands.pefts, bands.typical_tokens)
    groups = price_groups(bands, prices, MeshShape(mesh.tp, mesh.pp, 1))
    room = room_for_groups(bands, groups, mesh)
    ends = sorted({0, mesh.pp - 1})
    layers = stages_layers(model, tuple(bands.pefts), mesh.layers_per_stage)

    def needed(members, stage: int) -> tuple[int, int]:
        shape = problem.shape(members, "pack", None, dp=1)
        works = sample_works(HTaskChoice(task_ids=members, shape=shape), problem.data)
        (fullest,) = works.fullest
        work = replace(fullest, targets=works.mean.targets)  # the bound knows the mean of them alone
        first, last, sharding = stage == 0, stage == mesh.pp - 1, Sharding(tp=mesh.tp)
        kept = kept_bytes(model, layers[stage], first=first, last=last, work=work, sharding=sharding)
        workspace = max(
            measure(model, last=last, work=work, layer=layers[stage][-1][0], sharding=sharding)
            for measure in (forward_workspace_bytes, backward_workspace_bytes)
        )
        return kept.total_bytes, workspace

    return bands, room, ends, needed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [Mesh((8,), 1, 1), Mesh((4, 4), 2, 1), Mesh((1,) * 8, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "methods", [*([name] for name in METHODS), ["prompt", "lora"], list(METHODS)], ids="+".join
)
def test_no_group_needs_more_than_surely_suffices(methods, mesh, dtype):
    bands, room, ends, needed = rooms(methods, dtype, mesh)
    for end, w in np.argwhere(bands.exists_nw).tolist():
        members = bands.task_ids[end - w : end + 1]
        for stage, of_stage in zip(ends, room.stages, strict=True):
            kept, workspace = needed(members, stage)
            lowest, own = of_stage.least_nw[end, w], of_stage.kept_nw[end, w]
            assert lowest <= kept <= own, (members, stage)
            # What is kept already is taken off the temporaries that it is for, so both are seen together.
            assert kept + workspace <= own + of_stage.passing_nw[end, w], (members, stage)
