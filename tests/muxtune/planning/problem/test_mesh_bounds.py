"""Bounds for meshes on which nothing is built yet, against what is built there in the end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.mesh_bounds import MeshBounds
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import aligned_groups, in_order
from tests.muxtune.planning.problems import MIXED, TINY, FakeCosts, make_problem
from tests.sampling import examples

RANKS = 4
EXAMPLES = examples(100)
OPTIONS = PlanOptions()


def built(
    problem: PlanningProblem, shape: MeshShape, template: str, *, fused: bool, turns: bool
) -> PlanStructure:
    """All tasks on a mesh: in one hTask or one each, on one copy of the backbone or each on its own."""
    groups = [tuple(problem.data)] if fused else [(task_id,) for task_id in problem.data]
    htasks, mesh = aligned_groups(problem, replace(OPTIONS, **shape._asdict()), groups)
    if turns:
        htasks = [replace(htask, instance=number) for number, htask in enumerate(htasks)]
    return in_order(htasks, mesh, template)


@st.composite
def problems(draw: st.DrawFn) -> PlanningProblem:
    """Some of the mixed tasks on four devices, with launches that weigh little or much."""
    tasks = draw(st.lists(st.sampled_from(MIXED), min_size=1, max_size=4))
    costs = FakeCosts(launch_s=draw(st.sampled_from([1e-6, 1e-4, 2e-3])))
    return make_problem(tasks, ranks=RANKS, costs=costs)


@settings(max_examples=EXAMPLES)
@given(
    problems(), st.booleans(), st.booleans(), st.sampled_from(["flush", "continuous", "gpipe"]), st.randoms()
)
def test_no_mesh_is_faster_than_its_bound(problem, fused, turns, template, random):
    """Whatever was seen before, with as many ranks per stage."""
    shapes = [
        MeshShape(1, pp, dp) for pp in range(1, RANKS + 1) for dp in range(1, RANKS + 1) if pp * dp <= RANKS
    ]
    seen = random.sample(shapes, random.randint(1, 3))
    bounds = MeshBounds(problem)
    bounds.see(built(problem, shape, template, fused=fused, turns=turns) for shape in seen)
    for shape in shapes:
        structure = built(problem, shape, template, fused=fused, turns=turns)
        least_s = bounds.least_s(shape)
        assert (least_s > 0) == any(shape.dp % each.dp == 0 for each in seen)
        assert least_s <= structure_iteration_s(problem, structure) * (1 + 1e-9), shape


def test_a_bound_comes_near_where_layers_are_most_of_the_work():
    problem = make_problem(ranks=RANKS, model=TINY.model_copy(update={"layers": 32}))
    bounds = MeshBounds(problem)
    structure = built(problem, MeshShape(1, 1, 1), "continuous", fused=True, turns=False)
    bounds.see([structure])
    assert bounds.least_s(MeshShape(1, 1, 1)) > 0.8 * structure_iteration_s(problem, structure)


def test_nothing_is_known_of_other_numbers_of_ranks_per_stage():
    problem = make_problem(ranks=RANKS)
    bounds = MeshBounds(problem)
    assert bounds.least_s(MeshShape(1, 2, 1)) == 0
    bounds.see([built(problem, MeshShape(1, 1, 1), "flush", fused=True, turns=False)])
    assert bounds.least_s(MeshShape(1, 2, 1)) > 0
    assert bounds.least_s(MeshShape(2, 2, 1)) == 0


def test_a_mesh_that_cannot_hold_the_backbones_is_never_the_best():
    roomy = make_problem(ranks=RANKS)
    structure = built(roomy, MeshShape(1, RANKS, 1), "flush", fused=False, turns=True)
    needed = max(stage.backbone_bytes for stage in roomy.memory(structure))
    problem = make_problem(ranks=RANKS, memory_bytes=2 * needed)
    bounds = MeshBounds(problem)
    bounds.see([built(problem, MeshShape(1, RANKS, 1), "flush", fused=False, turns=True)])
    assert math.isinf(bounds.least_s(MeshShape(1, 1, 1)))
    assert math.isfinite(bounds.least_s(MeshShape(1, RANKS, 1)))


@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_what_is_seen_again_changes_nothing(template):
    problem = make_problem(ranks=RANKS)
    once, twice = MeshBounds(problem), MeshBounds(problem)
    structure = built(problem, MeshShape(1, 2, 1), template, fused=False, turns=False)
    once.see([structure])
    twice.see([structure, structure])
    for shape in candidate_meshes(problem.model, problem.cluster, OPTIONS, idle=True):
        assert once.least_s(shape) == twice.least_s(shape)
