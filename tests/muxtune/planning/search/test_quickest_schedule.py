"""Near the memory's limit: the fastest schedule that fits, against all schedules of a partition."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS as SETTINGS
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.bounds import exact_bounds
from muxtune.planning.problem.assemble import structure_iteration_s, structure_schedule
from muxtune.planning.problem.carrying import cut_variants
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import orchestrated, schedules
from muxtune.planning.search.quickest_schedule import Quickest, QuickestSchedule
from muxtune.planning.search.search import search_structures
from muxtune.planning.search.tried import Tried
from muxtune.policies import POLICIES
from muxtune.support.errors import SpecError
from tests.muxtune.planning.estimate.test_group_seconds import gpu_problem
from tests.sampling import sampled

MESHES = {
    "testbed-a": [Mesh((32,)), Mesh((9, 9, 9, 5)), Mesh((16, 16), tp=2), Mesh((17, 15), dp=2)],
    "testbed-c": [Mesh((5, 5, 5, 5, 4, 4, 3, 1)), Mesh((10, 10, 9, 3), tp=2), Mesh((16, 16), tp=4)],
}


def with_memory(problem: PlanningProblem, memory_bytes: int) -> PlanningProblem:
    """The same problem on devices with other memory."""
    cluster = problem.cluster
    device = cluster.device.model_copy(update={"memory_bytes": memory_bytes})
    tight = copy.copy(problem)
    tight.cluster = cluster.model_copy(update={"device": device})
    return tight


@dataclass(frozen=True)
class Known:
    """A schedule, and what an oracle says of it."""

    structure: PlanStructure
    seconds: float
    needed_bytes: int


def known(problem: PlanningProblem, structure: PlanStructure) -> Known:
    memory = problem.memory(structure, structure_schedule(structure))
    seconds = structure_iteration_s(problem, structure)
    return Known(structure, seconds, max(stage.total_bytes for stage in memory))


class Partition:
    """Random hTasks on a mesh, and all of their schedules."""

    def __init__(self, problem: PlanningProblem, mesh: Mesh, draw: np.random.Generator) -> None:
        self.mesh = mesh
        self.problem = problem
        owner = draw.integers(0, draw.integers(1, 5), len(problem.data))
        self.htasks: list[HTaskChoice] = []
        for group in np.unique(owner):
            ids = tuple(task_id for task_id, own in zip(problem.data, owner, strict=True) if own == group)
            shape = problem.shape(ids, str(draw.choice(["pack", "pad"])), dp=mesh.dp)  # type: ignore[arg-type]
            self.htasks.append(HTaskChoice(task_ids=ids, shape=shape))
        variants = list(cut_variants(problem, self.htasks, mesh))
        if variants and draw.random() < 0.5:
            self.htasks = list(variants[draw.integers(len(variants))])
        self.times = [problem.htask_times(htask, mesh) for htask in self.htasks]
        self.latency_s = [each.slowest_s for each in self.times]
        self.sequential = [
            known(problem, each)
            for each in schedules(
                self.htasks, self.latency_s, mesh, SETTINGS.templates, SETTINGS.most_groupings
            )
        ]
        self._overlapped: dict[PlanStructure, Known] = {}

    def best(self, limit: int) -> float:
        """Least seconds of what fits: one by one, and of the fastest of these with overlap.

        Schedules that drain count where the fastest of the others does not fit.
        """
        lasting = [k for k in self.sequential if k.structure.template == "continuous"]
        drains = min(lasting, key=lambda k: k.seconds).needed_bytes > limit
        fit = [k for k in (self.sequential if drains else lasting) if k.needed_bytes <= limit]
        fit.sort(key=lambda k: k.seconds)
        if self.mesh.tp > 1:
            base = [k.structure for k in fit[: SETTINGS.most_orchestrated]]
            for structure in orchestrated(self.problem, base, self.latency_s, SETTINGS.modes):
                if structure not in self._overlapped:
                    self._overlapped[structure] = known(self.problem, structure)
                fit.append(self._overlapped[structure])
        return min((k.seconds for k in fit if k.needed_bytes <= limit), default=np.inf)

    def find(self, limit: int, *, below_s: float = np.inf, prune: bool = True) -> Quickest:
        run = max(htask.shape.carry for htask in self.htasks)
        bounds = exact_bounds(self.times, [htask.shape.microbatches for htask in self.htasks], run)
        overlaps = self.mesh.tp > 1
        problem = with_memory(self.problem, limit)
        finder = QuickestSchedule(
            problem, SETTINGS.templates, SETTINGS.modes, None, Tried(problem), prune=prune
        )
        share = 0.5 if overlaps else 1.0  # collectives are no more than half of a stage here
        return finder.find(
            self.htasks,
            self.latency_s,
            self.mesh,
            bounds,
            overlaps=overlaps,
            share=share,
            below_s=below_s,
        )


@pytest.mark.parametrize("seed", sampled(range(6), 3))
@pytest.mark.parametrize("cluster", MESHES)
def test_the_fastest_schedule_that_fits_is_found_whatever_the_memory(cluster, seed):
    draw = np.random.default_rng(seed)
    problem = gpu_problem(6, seed=seed, cluster=cluster)
    tight = 0
    for mesh in MESHES[cluster]:
        partition = Partition(problem, mesh, draw)
        needs = sorted({k.needed_bytes for k in partition.sequential})
        fastest_s = min(k.seconds for k in partition.sequential)
        for limit in {*needs, *(need - 1 for need in needs)}:
            best_s = partition.best(limit)
            found = partition.find(limit)
            assert found.value == pytest.approx(best_s, rel=1e-12), (mesh, limit)
            assert found.fate == ("fits" if np.isfinite(best_s) else "memory")
            assert partition.find(limit, prune=False).value <= best_s * (1 + 1e-12)  # all are played
            if np.isfinite(best_s):
                tight += best_s > fastest_s * 1.0001
                if found.structure is not None and found.structure.template == "continuous":
                    below = partition.find(limit, below_s=best_s * 1.0001)
                    assert (below.fate, below.value) == ("fits", pytest.approx(best_s, rel=1e-12))
                assert partition.find(limit, below_s=best_s * 0.9999).fate != "fits"
    assert tight, "no limit lay between the schedules of a partition"


@pytest.mark.parametrize("share", [0.995, 0.98, 0.9])
@pytest.mark.parametrize("seed", [3, 8])
def test_near_the_limit_the_search_is_as_good_as_all_partitions(seed, share):
    """On all meshes; memory is that share of what the best plan needs."""
    problem = gpu_problem(4, seed=seed, cluster="testbed-a")
    roomy = search_structures(problem, PlanOptions(pp=4)).structures[0]
    held = max(s.backbone_bytes + s.table_bytes + s.optimizer_bytes for s in problem.memory(roomy))
    needed = known(problem, roomy).needed_bytes
    tight = with_memory(problem, int(held + share * (needed - held)))
    options = PlanOptions(pp=4)
    try:
        (best, *_) = POLICIES.get("exhaustive").propose(tight, options)
    except SpecError:
        with pytest.raises(SpecError):
            search_structures(tight, options)
        return
    found = search_structures(tight, options).structures[0]
    assert known(tight, found).needed_bytes <= tight.cluster.device.memory_bytes
    assert structure_iteration_s(tight, found) <= 1.01 * structure_iteration_s(tight, best)


@pytest.mark.parametrize("seed", [3, 4, 7])
def test_other_numbers_of_buckets_are_tried_where_the_usual_ones_do_not_fit(seed):
    problem = gpu_problem(9, seed=seed, cluster="testbed-c")
    mesh = Mesh((5, 5, 5, 5, 4, 4, 3, 1))
    htasks = [HTaskChoice(task_ids=(i,), shape=problem.shape((i,), "pack")) for i in problem.data]
    times = [problem.htask_times(htask, mesh) for htask in htasks]
    latency_s = [each.slowest_s for each in times]
    usual = [
        known(problem, s)
        for s in schedules(htasks, latency_s, mesh, SETTINGS.templates, SETTINGS.most_groupings)
    ]
    every = [known(problem, s) for s in schedules(htasks, latency_s, mesh, SETTINGS.templates, len(htasks))]
    limit = min(k.needed_bytes for k in every)
    assert limit < min(k.needed_bytes for k in usual)
    bounds = exact_bounds(times, [htask.shape.microbatches for htask in htasks], 1)
    tight = with_memory(problem, limit)
    finder = QuickestSchedule(tight, SETTINGS.templates, (), None, Tried(problem), prune=True)
    found = finder.find(htasks, latency_s, mesh, bounds, overlaps=False)
    assert found.fate == "fits"
    assert found.value == min(k.seconds for k in every if k.needed_bytes <= limit)
