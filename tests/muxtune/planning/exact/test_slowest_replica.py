"""Replicas wait for the slowest: prices against every replica's own micro-batches, laid out one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.helpers.fusion_instances import cpu_costs
from muxtune.batches import attention_calls, layout_step
from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.compose import step_seconds
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.operators import PHASES
from muxtune.model import PRESETS
from muxtune.plan import Orchestration
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh, PlanStructure
from muxtune.planning.problem.assemble import assemble_plan, structure_iteration_s
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template
from muxtune.tasks import Workload, workload_from
from sim import simulate_operators
from tests.muxtune.batches.carried import carried_attention_calls
from tests.muxtune.costs.actions import stage_seconds

MODEL = PRESETS["llama-tiny"]
CLUSTER = load_cluster("testbed-c")
LAYOUTS = [Layout("pack"), Layout("pad"), Layout("chunk", 256), Layout("chunk", 32, 2)]


COSTS: dict[str, CostModel] = {
    # Without the host, whose launches would hide what a tiny backbone computes.
    "gpu": AnalyticCosts("h100", MODEL, interconnect_of(CLUSTER), host_launch_s=0.0),
    "cpu": cpu_costs(MODEL),
}


def ragged(
    folder: Path, tasks: Sequence[Sequence[int]], *, micro: int = 2, costs: str = "gpu"
) -> PlanningProblem:
    """A problem with tasks of sequences of these lengths, all of them in every step."""
    content = []
    for number, lengths in enumerate(tasks):
        path = folder / f"t{number}.jsonl"
        # A token for every byte, and two around them.
        path.write_text("".join(json.dumps({"text": "a" * (n - 2)}) + "\n" for n in lengths))
        content.append(
            {
                "id": f"t{number}",
                "peft": {"method": "lora", "r": 8 << number, "alpha": 16, "targets": ["all-linear"]},
                "dataset": {"path": path.name},
                "global_batch_size": len(lengths),
                "micro_batch_size": next(m for m in range(micro, 0, -1) if len(lengths) % m == 0),
                "max_length": 256,
                "learning_rate": 1e-3,
                "steps": 1,
                "seed": number,
            }
        )
    workload = workload_from({"tasks": content}, "workload", folder)
    return PlanningProblem(workload, MODEL, CLUSTER, COSTS[costs])


def drawn(folder: Path, seed: int, *, tasks: int = 2, costs: str = "gpu") -> PlanningProblem:
    """A few tasks with sequences of very different lengths."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, tasks)
    return ragged(
        folder,
        [rng.choice([8, 20, 60, 61, 200, 250], size).tolist() for size in sizes],
        micro=int(rng.integers(1, 4)),
        costs=costs,
    )


def fused(
    problem: PlanningProblem, layout: Layout, mesh: Mesh, template: Template = "continuous"
) -> PlanStructure:
    """All tasks in one hTask."""
    ids = tuple(problem.data)
    htask = HTaskChoice(task_ids=ids, shape=problem.shape(ids, *layout, dp=mesh.dp))
    return PlanStructure(htasks=(htask,), buckets=((0,),), template="continuous", mesh=mesh)


def replica_works(problem: PlanningProblem, htask: HTaskChoice, replica: int) -> list[MicrobatchWork]:
    """Micro-batches of a replica in the first step, as the runtime takes them."""
    members = [problem.data[task_id] for task_id in htask.task_ids]
    m = htask.shape.microbatches
    layouts = layout_step(htask.shape, [data.batch_lengths(0) for data in members])
    layouts = layouts[replica * m : (replica + 1) * m]
    found = []
    for layout in layouts:
        targets = 0
        for s in layout.segments:
            example = members[s.task].batch(0)[s.sequence]
            length = s.offset + s.length + s.after
            predicted = range(length - 1 - example.target_tokens, length - 1)
            targets += len(set(predicted) & set(range(s.offset, s.offset + s.length)))
        found.append(
            MicrobatchWork(
                tokens=layout.tokens,
                task_tokens=tuple(span.stop - span.start for span in layout.spans),
                pefts=tuple(data.task.peft for data in members),
                attention=tuple((1.0, *call) for call in attention_calls(layout)),
                targets=targets,
                carried_attention=tuple((1.0, *call) for call in carried_attention_calls(layout)),
            )
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("pp", "dp", "tp"), [(1, 2, 1), (2, 3, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_a_stage_takes_as_long_as_its_slowest_replica(tmp_path, layout, pp, dp, tp, seed):
    problem = drawn(tmp_path, 100 * pp + 10 * dp + seed)
    mesh = Mesh((MODEL.layers // pp,) * pp, tp, dp)
    structure = fused(problem, layout, mesh)
    (htask,) = structure.htasks
    times = problem.htask_times(htask, mesh)
    m = htask.shape.microbatches
    for stage, (layers, loads_s) in enumerate(
        zip(mesh.layers_per_stage, loads(problem, htask, mesh), strict=True)
    ):
        replicas = mesh.on(CLUSTER).replica_routes(stage)
        steps_s = sum(
            step_seconds(problem.costs, MODEL, layers, task.peft, tp=tp, replicas=replicas)
            for task in problem.tasks
        )
        priced_s = m * (times.fwd_s[stage] + times.bwd_s[stage])
        assert priced_s == pytest.approx(max(loads_s) + steps_s, rel=1e-9)


@pytest.mark.parametrize("costs", ["gpu", "cpu"])
@pytest.mark.parametrize("layout", [Layout("pack"), Layout("chunk", 256)], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_no_number_of_replicas_beats_the_longest_sequence_alone(tmp_path, layout, seed, costs):
    whole = drawn(tmp_path, seed, tasks=1, costs=costs)
    (data,) = whole.data.values()
    alone = ragged(tmp_path, [[int(data.lengths.max())]], costs=costs)
    longest_s = structure_iteration_s(alone, fused(alone, layout, Mesh((MODEL.layers,))))
    for dp in (1, 2, 3, 4, 8):
        structure = fused(whole, layout, Mesh((MODEL.layers,), dp=dp))
        assert structure_iteration_s(whole, structure) >= longest_s * (1 - 1e-12), dp


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_sequence_a_step_takes_as_long_on_any_number_of_replicas(tmp_path, layout, pp):
    """But for the sum of the gradients; and replicas without a sequence count no tokens."""
    problem = ragged(tmp_path, [[250]])
    (data,) = problem.data.values()
    layers = (MODEL.layers // pp,) * pp
    one = fused(problem, layout, Mesh(layers))
    alone = problem.htask_times(one.htasks[0], one.mesh)
    for dp in range(2, 8 // pp + 1):
        structure = fused(problem, layout, Mesh(layers, dp=dp))
        shared = problem.htask_times(structure.htasks[0], structure.mesh)
        placement = structure.mesh.on(CLUSTER)
        assert shared.fwd_s == pytest.approx(alone.fwd_s, rel=1e-12)
        for stage, number in enumerate(layers):
            alone_s, summed_s = (
                step_seconds(problem.costs, MODEL, number, data.task.peft, replicas=replicas)
                for replicas in ((), placement.replica_routes(stage))
            )
            assert summed_s > alone_s
            more_s = (summed_s - alone_s) / structure.htasks[0].shape.microbatches
            assert shared.bwd_s[stage] == pytest.approx(alone.bwd_s[stage] + more_s, rel=1e-12)
        assert problem.iteration_tokens(structure) == problem.iteration_tokens(one)


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_is_faster_than_its_bound_and_the_simulator_agrees(tmp_path, seed):
    problem = drawn(tmp_path, seed, tasks=3)
    tp, pp, dp = [(1, 1, 4), (2, 2, 2), (1, 2, 4), (2, 1, 3)][seed % 4]
    mesh = Mesh((MODEL.layers // pp,) * pp, tp, dp)
    htasks = tuple(
        HTaskChoice(task_ids=ids, shape=problem.shape(ids, *LAYOUTS[seed % 3], dp=dp))
        for ids in (("t0", "t2"), ("t1",))
    )
    template: Template = "flush" if seed % 2 else "continuous"
    structure = PlanStructure(htasks=htasks, buckets=((0,), (1,)), template=template, mesh=mesh)
    plan = assemble_plan(problem, structure, "made-by-hand")
    predicted = plan.predicted
    assert predicted.lower_bound_s <= predicted.iteration_s * (1 + 1e-9)
    # Nor faster than the work of any replica on any stage.
    loads_s = sum(np.array(loads(problem, htask, mesh)) for htask in htasks)
    assert loads_s.max() <= predicted.iteration_s * (1 + 1e-9)
    again = simulate_operators(plan, problem.costs).predicted
    assert again.iteration_s == pytest.approx(predicted.iteration_s, rel=1e-9)
    assert again.tokens_per_s == pytest.approx(predicted.tokens_per_s, rel=1e-9)


@pytest.mark.parametrize("mode", ["intra", "interleaved"])
@pytest.mark.parametrize("dp", [2, 4])
def test_launch_orders_of_replicas_are_those_that_every_replica_can_follow(tmp_path, mode, dp):
    """One sequence is on one replica; the others launch the same without it."""
    problem = ragged(tmp_path, [[250], [8, 60, 200]])
    layouts = (Layout("chunk", 32, 2), Layout("pack"))
    htasks = tuple(
        HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), *layout, dp=dp))
        for task_id, layout in zip(problem.data, layouts, strict=True)
    )
    structure = PlanStructure(
        htasks=htasks,
        buckets=((0, 1),),
        template="flush",
        mesh=Mesh((MODEL.layers,), 2, dp),
        orchestration=Orchestration(mode=mode, contention=0.1),
    )
    plan = assemble_plan(problem, structure, "made-by-hand")  # checks the orders
    assert plan.orchestration.launches
    again = simulate_operators(plan, problem.costs).predicted
    assert again.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=1e-9)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout("chunk", 16, 4)], ids=str)
@pytest.mark.parametrize("dp", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_a_step_are_those_of_streams_with_a_sequence(tmp_path, layout, dp, seed):
    problem = drawn(tmp_path, seed, tasks=3)
    structure = fused(problem, layout, Mesh((MODEL.layers,), dp=dp))
    (htask,) = structure.htasks
    layouts = layout_step(htask.shape, [data.batch_lengths(0) for data in problem.data.values()])
    carry = htask.shape.carry
    groups = [layouts[i : i + carry] for i in range(0, len(layouts), carry)]
    expected = sum(carry * htask.shape.tokens for group in groups if any(each.segments for each in group))
    assert problem.iteration_tokens(structure).all == expected
    assert 0 < expected <= htask.shape.groups * htask.shape.tokens
    assert problem.alignment_report(structure).plan.all == expected


def test_the_sum_of_gradients_is_priced_where_the_replicas_of_each_stage_are(tmp_path):
    """Six ranks a replica on nodes of eight: only the first stage's replicas share a node."""
    cluster = load_cluster("a100-16")
    links = interconnect_of(cluster)
    costs = AnalyticCosts("a100", MODEL, links)
    problem = PlanningProblem(
        Workload(tasks=tuple(ragged(tmp_path, [[250] * 4]).tasks)), MODEL, cluster, costs
    )
    mesh = Mesh((2, 2, 4), 2, 2)
    htask = HTaskChoice(task_ids=("t0",), shape=problem.shape(("t0",), "pack", dp=2))
    (task,) = problem.tasks
    times = problem.htask_times(htask, mesh)
    for stage, kind in enumerate(problem.stage_kinds(mesh)):
        adapters = [(linear.in_features, linear.out_features) for linear in MODEL.shard(2).linears]
        sum_bytes = 4.0 * mesh.layers_per_stage[stage] * task.peft.r * sum(i + o for i, o in adapters)
        sum_s = links.all_reduce_s(sum_bytes, 2, per_node=2 if stage == 0 else 1)
        step_s = step_seconds(costs, MODEL, kind.layers, task.peft, tp=2) + sum_s
        backward_s = stage_seconds(
            costs,
            MODEL,
            kind.layers,
            first=kind.first,
            last=kind.last,
            work=problem.slowest_work(htask, kind, 2),
            phase="bwd",
            tp=2,
        )
        expected_s = backward_s + step_s / htask.shape.microbatches
        assert times.bwd_s[stage] == pytest.approx(expected_s, rel=1e-12)


def loads(problem: PlanningProblem, htask: HTaskChoice, mesh: Mesh) -> list[list[float]]:
    """Seconds of an hTask's micro-batches in the first step, per stage and replica, without steps."""
    works = [mean_of(replica_works(problem, htask, replica)) for replica in range(mesh.dp)]
    return [
        [
            htask.shape.microbatches
            * sum(
                stage_seconds(
                    problem.costs,
                    MODEL,
                    layers,
                    first=stage == 0,
                    last=stage == mesh.pp - 1,
                    work=work,
                    phase=phase,
                    tp=mesh.tp,
                )
                for phase in PHASES
            )
            for work in works
        ]
        for stage, layers in enumerate(mesh.layers_per_stage)
    ]


def mean_of(works: Sequence[MicrobatchWork]) -> MicrobatchWork:
    """Average micro-batch."""
    m = len(works)
    return replace(
        works[0],
        task_tokens=tuple(
            round(sum(tokens) / m) for tokens in zip(*(w.task_tokens for w in works), strict=True)
        ),
        attention=tuple((n / m, *call) for work in works for n, *call in work.attention),
        targets=sum(work.targets for work in works) / m,
        carried_attention=tuple((n / m, *call) for work in works for n, *call in work.carried_attention),
    )
