"""Micro-batches that are cut over carry groups: who is cut, and where it pays, on the cost model of A40s."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.planning.problem.carrying import carries_at, may_carry
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.search import search_structures
from muxtune.support.errors import NotEnoughMemoryError
from muxtune.tasks import workload_from

PIPELINE = PlanOptions(tp=1, pp=4, dp=1)


def long_tenant(folder, *, shorts: int = 4, memory_bytes: int | None = None) -> PlanningProblem:
    """One tenant with 2048 tokens per sequence beside some with 64, on four A40."""
    lengths = np.random.default_rng(0).integers(1500, 2040, 64).tolist()
    lines = [json.dumps({"prompt": "x" * length, "completion": "ab"}) for length in lengths]
    (folder / "long.jsonl").write_text("\n".join(lines))
    default = {
        "peft": {"method": "lora", "r": 16, "alpha": 16, "targets": ["all-linear"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "max_length": 64,
        "learning_rate": 1e-4,
        "steps": 3,
    }
    long = {
        "id": "long",
        "dataset": {"path": "long.jsonl"},
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "max_length": 2048,
    }
    tasks = [default | long, *({"id": f"short-{i}", "seed": i} | default for i in range(shorts))]
    cluster = load_cluster("testbed-a")
    if memory_bytes is not None:
        device = cluster.device.model_copy(update={"memory_bytes": memory_bytes})
        cluster = cluster.model_copy(update={"device": device})
    model = load_model_spec("llama2-7b")
    costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    return PlanningProblem(workload_from({"tasks": tasks}, "workload", folder), model, cluster, costs)


def needed_bytes(problem, structure) -> int:
    return max(assemble_plan(problem, structure, "test").predicted.peak_memory_bytes)


def test_a_long_tenant_is_cut_and_the_pipeline_is_faster_and_smaller(tmp_path):
    problem = long_tenant(tmp_path)
    whole = search_structures(problem, replace(PIPELINE, carry=1))
    cut = search_structures(problem, PIPELINE)
    assert whole.outcomes[0].value > 1.15 * cut.outcomes[0].value
    best = cut.structures[0]
    (htask,) = [htask for htask in best.htasks if "long" in htask.task_ids]
    assert htask.shape.carry > 1
    assert htask.shape.row_tokens < problem.longest_sequence(["long"])
    # A carry group has the sequences of a declared micro-batch.
    assert htask.shape.carry_groups == problem.data["long"].task.declared_microbatches
    assert needed_bytes(problem, best) < needed_bytes(problem, whole.structures[0])


def test_where_no_whole_micro_batch_fits_a_cut_one_may(tmp_path):
    whole = replace(PIPELINE, carry=1)
    with pytest.raises(NotEnoughMemoryError) as refused:
        search_structures(long_tenant(tmp_path, shorts=0, memory_bytes=10**9), whole)
    least = refused.value.needed_bytes
    tight = long_tenant(tmp_path, shorts=0, memory_bytes=least - 1)
    with pytest.raises(NotEnoughMemoryError) as refused:
        search_structures(tight, whole)
    assert refused.value.needed_bytes == least
    found = search_structures(tight, PIPELINE).structures[0]
    assert max(found.carries) > 1
    assert needed_bytes(tight, found) < least


def test_who_is_cut_comes_nearest_to_the_pace():
    slots, tokens = np.array([1.0, 1.4, 1.5, 2.8, 2.9, 9.0]), np.full(6, 1024)
    assert carries_at(1.0, slots, tokens, DEFAULT_SETTINGS).tolist() == [1, 1, 2, 2, 4, 4]
    # Too short to be cut so often.
    assert carries_at(1.0, slots, np.full(6, 128), DEFAULT_SETTINGS).tolist() == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "free"),
    [
        (FREE, True),
        (PlanOptions(alignment="chunk"), True),
        (PlanOptions(alignment="pack"), False),
        (PlanOptions(chunk_tokens=64), False),
        (PlanOptions(carry=1), False),
        (PlanOptions(without=("chunking",)), False),
    ],
)
def test_what_is_fixed_by_hand_is_not_cut(options, free):
    assert may_carry(options) == free
