"""Layers per stage against all splits."""

from __future__ import annotations

from itertools import product

import pytest

from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.problem.meshes import choose_layers
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import TINY, make_problem


def busiest_s(problem: PlanningProblem, htasks: list[HTaskChoice], mesh: Mesh) -> float:
    """Work of the busiest stage in an iteration."""
    times = [(htask.shape.microbatches, problem.htask_times(htask, mesh)) for htask in htasks]
    return max(sum(m * (t.fwd_s[s] + t.bwd_s[s]) for m, t in times) for s in range(mesh.pp))


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_no_split_has_a_less_loaded_busiest_stage(pp):
    model = TINY.model_copy(update={"layers": 7})
    problem = make_problem(model=model, ranks=pp)
    htasks = [HTaskChoice(task_ids=(t,), shape=problem.shape((t,), "pack")) for t in problem.data]
    chosen = choose_layers(problem, htasks, pp)
    assert sum(chosen.layers_per_stage) == 7
    splits = [s for s in product(range(1, 8), repeat=pp) if sum(s) == 7]
    best_s = min(busiest_s(problem, htasks, Mesh(split)) for split in splits)
    assert busiest_s(problem, htasks, chosen) == pytest.approx(best_s, rel=1e-12)


def test_more_stages_than_layers_are_refused():
    problem = make_problem(ranks=5)
    htasks = [HTaskChoice(task_ids=("t0",), shape=problem.shape(("t0",), "pack"))]
    with pytest.raises(SpecError, match=r"parallelism.pp = 5: expected at most 4, the layers of llama-tiny"):
        choose_layers(problem, htasks, 5)
