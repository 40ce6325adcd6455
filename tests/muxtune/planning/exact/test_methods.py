"""HTasks of several PEFT methods: their price is that of the backbone and of every adapter, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.helpers.fusion_instances import cpu_costs
from muxtune.costs.compose import step_seconds
from muxtune.graph import Part, layer_graph, node_seconds, part_graph, stage_graph, time_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.operators import FWD_ONLY, PHASES, Phase
from muxtune.peft import EMBEDDING, Attachment, attachments, embedding_attachments
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh
from muxtune.planning.estimate.group_seconds import price_groups
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.exact.bounds import exact_bounds
from muxtune.planning.problem.meshes import MeshShape
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.all_partitions import SetBands
from muxtune.planning.search.candidates import Ranking
from tests.muxtune.graph.works import Rates
from tests.muxtune.planning.problems import MIXED, TINY, make_problem
from tests.sampling import examples

PEFTS = (
    {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    {"method": "lora", "r": 3, "alpha": 6, "targets": ["all-linear"], "layers": [1, 2]},
    {"method": "lora", "r": 4, "alpha": 6, "targets": ["o_proj"], "dropout": 0.1},
    {"method": "ia3", "targets": ["k_proj", "down_proj"], "feedforward": ["down_proj"]},
    {"method": "bottleneck", "size": 16},
    {"method": "bottleneck", "size": 8, "placement": "parallel", "blocks": ["mlp"], "layers": [3]},
    {"method": "prefix_tuning", "num_virtual_tokens": 5},
    {"method": "prompt_tuning", "num_virtual_tokens": 6},
)
COSTS = Rates(TINY)


def problem_of(pefts) -> PlanningProblem:
    tasks = [MIXED[i % len(MIXED)] | {"peft": peft} for i, peft in enumerate(pefts)]
    return make_problem(tasks, ranks=4, costs=COSTS)  # type: ignore[arg-type]


def attached_s(each: Attachment, tokens: float, phase: Phase, tp: int) -> float:
    """One attachment by itself: what it dispatches by, and its adapter."""
    ops = [shape.at(tokens) for shape in (each.dispatch, each.adapter) if shape is not None]
    costs = COSTS.shard(tp)
    return sum(costs.latency_s(op, "fwd" if op.kind in FWD_ONLY else phase) for op in ops)


def nodes_s(nodes, phase: Phase, tp: int) -> float:
    return sum(node_seconds(node, COSTS.shard(tp), phase) for node in nodes)


def expected_s(work: MicrobatchWork, layers: range, phase: Phase, tp: int) -> float:
    """The frozen operators of each layer of a stage and of its ends, and each adapter of each task."""
    shard, first, last = TINY.shard(tp), layers.start == 0, layers.stop == TINY.layers
    frozen = replace(work, pefts=(), task_tokens=())
    pairs = list(zip(work.pefts, work.task_tokens, strict=True))
    on = {n: [(each, t) for p, t in pairs for each in attachments(p, shard, n)] for n in layers}
    embedded = [(each, t) for p, t in pairs for each in embedding_attachments(p, shard)] if first else []
    begin = (layers.start, EMBEDDING)
    if first and not embedded:
        depths = ((n, each.depth) for n in layers for each, _ in on[n])
        begin = min(depths, default=(layers.stop, EMBEDDING))
    total = sum(attached_s(each, t, phase, tp) for each, t in embedded)
    for number in layers:
        if phase == "bwd" and number < begin[0]:
            continue
        trained = begin[1] if phase == "bwd" and number == begin[0] and begin[1] != EMBEDDING else None
        total += nodes_s(layer_graph(TINY, frozen, phase, tp=tp, layer=number, trained=trained), phase, tp)
        total += sum(attached_s(each, t, phase, tp) for each, t in on[number])
    if phase == "fwd":
        ends = ["feed", "embedding" if first else "receive", "head" if last else "send"]
    else:
        ends = ["head" if last else "receive", *(["send"] if not first else [])]
    total += sum(nodes_s(part_graph(Part(end), TINY, frozen, phase, tp=tp), phase, tp) for end in ends)
    return COSTS.action_s(total, phase)


@given(
    pefts=st.lists(st.sampled_from(PEFTS), min_size=2, max_size=5),
    mesh=st.sampled_from([(1, (4,)), (1, (2, 2)), (2, (4,)), (2, (1, 3))]),
    alignment=st.sampled_from(["pad", "pack"]),
)
@settings(max_examples=examples(60), deadline=None)
def test_the_exact_price_is_the_sum_over_the_backbone_and_every_adapter(pefts, mesh, alignment):
    problem = problem_of(pefts)
    tp, layers_per_stage = mesh
    ids = tuple(problem.data)
    htask = HTaskChoice(task_ids=ids, shape=problem.shape(ids, alignment))
    placed = Mesh(layers_per_stage, tp=tp)
    times = problem.htask_times(htask, placed)
    start = 0
    for stage, (kind, layers) in enumerate(zip(problem.stage_kinds(placed), layers_per_stage, strict=True)):
        work = problem.slowest_work(htask, kind, tp)
        assert len(work.pefts) == len(pefts)
        numbers = range(start, start := start + layers)
        steps_s = sum(
            step_seconds(COSTS, TINY, kind.layers, peft, tp=tp, replicas=kind.replicas, first=kind.first)
            for peft in work.pefts
        )
        fwd_s, bwd_s = (expected_s(work, numbers, phase, tp) for phase in PHASES)
        assert times.fwd_s[stage] == pytest.approx(fwd_s, rel=1e-9)
        assert times.bwd_s[stage] == pytest.approx(bwd_s + steps_s / htask.shape.microbatches, rel=1e-9)
        for phase in PHASES:
            graph = stage_graph(
                TINY, kind.layers, first=kind.first, last=kind.last, work=work, phase=phase, tp=tp
            )
            timed = sum(node.seconds for node in time_graph(graph, COSTS, phase).expand())
            assert timed == pytest.approx(fwd_s if phase == "fwd" else bwd_s, rel=1e-9)


@pytest.mark.parametrize("policy", ["muxtune", "muxtune-one-method-per-htask"])
def test_estimates_of_mixed_groups_are_near_their_exact_prices(policy):
    """What the search ranks by; it prices exactly what comes to the front."""
    problem = problem_of(PEFTS[:6])
    options = PlanOptions(tp=1, pp=2, dp=1, carry=1, one_method="one" in policy)
    meshes = Ranking(problem, options).propose([MeshShape(1, 2, 1)])
    found = [(each.mesh, proposal) for each in meshes for proposal in each.proposals]
    assert len(found) > 5
    mixes = 0
    for mesh, proposal in found:
        htasks = proposal.htasks(problem)
        times = [problem.htask_times(htask, mesh) for htask in htasks]
        bounds = exact_bounds(times, [htask.shape.microbatches for htask in htasks], 1)
        assert proposal.bound_s == pytest.approx(bounds.of(["flush", "continuous"]), rel=0.05)
        mixes += any(len({problem.data[t].task.peft.method for t in htask.task_ids}) > 1 for htask in htasks)
    assert (mixes == 0) == options.one_method


EVERYWHERE = [peft for peft in PEFTS if "layers" not in peft]


@pytest.mark.parametrize("peft", EVERYWHERE, ids=lambda peft: "-".join(map(str, peft.values())))
def test_estimates_know_in_how_many_micro_batches_a_group_runs(peft):
    """Adapters that share no launch were once priced at the tokens of a typical group."""
    sizes = [(16, 2), (32, 8), (48, 16), (48, 48)]
    tasks = [{"peft": peft, "global_batch_size": all_, "micro_batch_size": one} for all_, one in sizes]
    problem = make_problem(tasks, costs=cpu_costs(TINY))  # type: ignore[arg-type]
    shape, mesh = MeshShape(1, 2, 1), Mesh((2, 2))
    bands = SetBands(problem, list(problem.data), [Layout("pack")])
    stages = StagePrices(problem.costs, TINY, 1, bands.most_tokens, problem.settings.curve_points)
    prices = price_groups(bands, stages.between(bands.pefts, bands.typical_tokens), shape)
    for bit, task_id in enumerate(problem.data):
        htask = HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), "pack"))
        exact_s = problem.layer_seconds(htask, mesh)
        assert prices.layer_s_nw[(1 << bit) - 1, 0] == pytest.approx(exact_s, rel=0.07), htask.shape
