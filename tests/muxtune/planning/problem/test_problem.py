"""Shapes and prices of decisions on a mesh."""

from __future__ import annotations

import pytest

from muxtune.batches import layout_step
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.problem.meshes import choose_mesh
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import make_problem


@pytest.mark.parametrize("alignment", ["pad", "pack"])
@pytest.mark.parametrize("dp", [2, 3])
def test_replicas_share_the_sequences_of_every_step(alignment, dp):
    problem = make_problem(ranks=dp)
    ids = tuple(problem.data)
    alone, shared = problem.shape(ids, alignment), problem.shape(ids, alignment, dp=dp)
    assert shared.groups == dp * shared.microbatches
    assert shared.microbatches == -(-alone.microbatches // dp)
    assert shared.tokens <= alone.tokens
    lengths = [problem.data[task_id].batch_lengths(0) for task_id in ids]
    layouts = layout_step(shared, lengths)
    placed = sorted((s.task, s.sequence) for layout in layouts for s in layout.segments)
    assert placed == [(task, i) for task, own in enumerate(lengths) for i in range(len(own))]


def test_a_mesh_uses_the_ranks_that_are_left_for_stages():
    problem = make_problem(ranks=4)
    htasks = [HTaskChoice(task_ids=("t0",), shape=problem.shape(("t0",), "pack", dp=2))]
    mesh = choose_mesh(problem, htasks, PlanOptions(dp=2))
    assert (mesh.tp, mesh.pp, mesh.dp, mesh.ranks) == (1, 2, 2, 4)
    with pytest.raises(SpecError, match=r"--tp \* --pp \* --dp = .*1 \* 3 \* 2.*: expected at most 4"):
        choose_mesh(problem, htasks, PlanOptions(pp=3, dp=2))
