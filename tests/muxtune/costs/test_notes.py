"""What is doubtful about costs stands in the plan, whatever the same costs were asked for before."""

from dataclasses import replace

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs import AnalyticCosts, ProfiledCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.overhead import CLASSES, ActionOverhead, StageSum, fit_overhead
from muxtune.costs.profile import Overlap, Overlaps
from muxtune.graph.operators import Operator
from muxtune.model import PRESETS
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import plan_problem
from muxtune.support.errors import SpecError
from tests.muxtune.costs.synthetic import MODEL, analytic_law, make_profile, operators
from tests.muxtune.planning.problems import make_workload

STAGES = [Operator("stage", (layers, tasks, 8, 2, 64)) for layers in (1, 3) for tasks in (1, 4)]
SUMS = [Operator("all_reduce", (n, 2)) for n in (64, 4096, 1 << 20)]
GRID = [*operators(), *SUMS]


def law(op, phase):
    """Stages without any overhead; the roofline for the rest."""
    return 1e-3 * op.dims[0] if op.kind == "stage" else analytic_law()(op, phase)


def notes_of(costs, *ops):
    with costs.exploring(), costs.noting() as notes:
        for op in ops:
            costs.latency_s(op, "fwd")
    return notes


def planned(costs, *, cluster="cpu-2", **options):
    tasks = ({}, {"dataset": {"lengths": "rte"}, "max_length": 256})
    problem = PlanningProblem(make_workload(tasks), costs.model, load_cluster(cluster), costs)
    return plan_problem(problem, options=PlanOptions(**options))[0]


def test_the_farthest_shape_of_each_kind_is_noted_and_only_inside():
    costs = ProfiledCosts(make_profile(law, GRID), MODEL)
    notes = notes_of(
        costs, *(Operator("norm", (n,)) for n in (8192, 16384, 100)), Operator("activation", (64,))
    )
    outside = [note for note in notes if "outside what profile" in note]
    assert len(outside) == 1
    assert outside[0].startswith("norm at tokens=16384 is a factor 4.00 outside what profile cpu-llama-tiny")
    assert not [note for note in notes_of(costs, Operator("norm", (100,))) if "outside" in note]


def test_notes_of_a_plan_depend_on_no_plan_before():
    fresh, used = (ProfiledCosts(make_profile(law, GRID), MODEL) for _ in range(2))
    with used.exploring():
        used.latency_s(Operator("norm", (10**6,)), "fwd")
    planned(used, tp=2)
    for options in ({"pp": 2}, {"tp": 2}, {"pp": 1}):
        assert planned(used, **options).costs == planned(fresh, **options).costs
    widths = [note for note in planned(used, tp=2).derived.cost_notes if note.startswith("linear at")]
    assert len(widths) == 1  # of shards, which nobody measured
    assert not [note for note in planned(used, pp=2).derived.cost_notes if note.startswith("linear at")]


def test_costs_without_a_measured_stage_say_that_they_add_up():
    (note,) = notes_of(ProfiledCosts(make_profile(law, GRID), MODEL))
    assert note.startswith("no whole stage was measured: operators add up as if each ran alone")


def test_notes_of_the_profile_and_of_its_user_come_first():
    profile = make_profile(law, GRID)
    profile = replace(
        profile, provenance=profile.provenance.model_copy(update={"notes": ("2 ranks shared 1",)})
    )
    notes = notes_of(ProfiledCosts(profile, MODEL, ("measured on the moon",)))
    assert notes[:2] == ["measured on the moon", "2 ranks shared 1"]


def stage(measured_s, **classes_s):
    own = dict.fromkeys(CLASSES, 0.0) | classes_s
    return StageSum(STAGES[0], "fwd", measured_s, own, 10)


@pytest.mark.parametrize(("ratio", "rests"), [(8.0, True), (1.1, False), (0.1, True)])
def test_factors_that_rest_on_their_bounds_are_named(ratio, rests):
    # Fixed and per-operator seconds explain nothing here: stages differ in their operators' seconds alone.
    stages = [stage(ratio * s, linear=s) for s in (1e-3, 4e-3, 16e-3, 64e-3, 256e-3)]
    doubts = fit_overhead(stages).doubts
    assert bool(doubts) == rests
    if rests:
        assert doubts[0].startswith("what operators take inside a stage rests on bounds of its fit (linear ")


def test_no_stage_is_another_doubt_than_a_bound():
    assert "no whole stage" in fit_overhead([]).doubts[0]
    assert ActionOverhead(stages=3).doubts == []


def test_overlap_that_could_not_be_seen_is_noted_where_ranks_sum():
    rounds = [
        Overlap(tokens=64, calls=1, compute_s=1e-3, communication_s=c, both_s=2e-3) for c in (1e-7, 1e-4)
    ]
    profile = replace(make_profile(law, GRID), overlaps=Overlaps(ranks=2, rounds=tuple(rounds)))
    costs = ProfiledCosts(profile, MODEL)
    said = [
        note for note in notes_of(costs, SUMS[0]) if note.startswith("in 1 of 2 rounds an all-reduce added")
    ]
    assert len(said) == 1
    assert not [note for note in notes_of(costs, Operator("norm", (64,))) if "rounds" in note]


def test_transfers_that_show_no_rate_are_noted_where_something_is_sent():
    def flat(op, phase):
        return 90e-6 - 1e-12 * op.dims[0] if op.kind == "p2p" else law(op, phase)

    costs = ProfiledCosts(make_profile(flat, GRID), MODEL)
    assert any("show no rate" in note for note in notes_of(costs, Operator("p2p", (4096,))))
    assert not any("show no rate" in note for note in notes_of(costs, Operator("norm", (64,))))


def test_a_mesh_beyond_the_measured_collectives_is_refused():
    costs = ProfiledCosts(make_profile(law, GRID), MODEL)
    assert costs.largest_group == 2
    assert planned(costs, cluster="cpu-4", tp=2).parallelism.tp == 2
    assert planned(costs, cluster="cpu-4").parallelism.pp == 4
    for options in ({"tp": 4}, {"dp": 4}):
        expected = (
            "^--tp and --dp = .*: expected at most 2, the ranks of the largest collective that cpu-llama"
        )
        with pytest.raises(SpecError, match=expected):
            planned(costs, cluster="cpu-4", **options)
    without = ProfiledCosts(make_profile(law, operators()), MODEL)
    with pytest.raises(SpecError, match="expected at most 1, the ranks of"):
        planned(without, tp=2)


def test_overlap_that_nobody_measured_is_said_by_plans_that_overlap():
    costs = AnalyticCosts("a40", PRESETS["llama2-7b"], interconnect_of(load_cluster("testbed-a")))
    said = "computing beside a collective is taken to slow neither: nobody measured it on this device"
    assert said in planned(costs, cluster="testbed-a", tp=2, orchestration="interleaved").derived.cost_notes
    assert (
        said not in planned(costs, cluster="testbed-a", tp=2, orchestration="sequential").derived.cost_notes
    )
    assert said not in planned(costs, cluster="testbed-a", tp=1).derived.cost_notes


def test_a_gpu_says_what_is_derived_and_assumed():
    model = PRESETS["llama2-7b"]
    cluster = load_cluster("testbed-a")
    notes = notes_of(AnalyticCosts("a40", model, interconnect_of(cluster)))
    assert any(
        note.startswith("link nvlink-pair of a40 is derived, not measured: NVIDIA A40") for note in notes
    )
    assert any("a launch from Python takes 5 us, which is assumed" in note for note in notes)
    whole = model.model_copy(update={"dtype": "float32"})
    notes = notes_of(AnalyticCosts("a100", whole, interconnect_of(load_cluster("a100-2"))))
    assert any(note.startswith("float32 on a100 is priced by data sheets") for note in notes)
    assert not any("derived" in note for note in notes)
