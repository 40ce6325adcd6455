"""Plans: from the durations in the file, and operator by operator with the costs that made them."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from muxtune.costs import save_profile
from muxtune.orchestration import decode_turns, encode_turns
from muxtune.plan import Predicted, check_plan, finish_plan, stage_times
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.problem.assemble import assemble_plan
from muxtune.schedule import (
    COMMUNICATION,
    COMPUTE,
    build_schedule,
    evaluate_schedule,
    load_trace,
    steady_iteration_s,
    track_name,
)
from muxtune.support.errors import SpecError
from sim import plan_costs, simulate_operators, simulate_plan
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators
from tests.muxtune.planning.problems import make_problem
from tests.perfetto import perfetto_stacks
from tests.plans import changed, entries, make_plan
from tests.sim.plans import costs, launched_plan, orchestrated_plan

RELATIVE = 1e-9  # only the order of additions may differ

MODES = ("sequential", "intra", "round-robin", "interleaved")


def test_a_plan_is_simulated_with_its_own_durations():
    plan = make_plan()
    report = simulate_plan(plan)
    assert report.predicted.model_dump().keys() == Predicted.model_fields.keys()
    spans = evaluate_schedule(plan.actions, stage_times(plan))
    assert report.predicted.iteration_s == pytest.approx(steady_iteration_s(spans), rel=RELATIVE)
    assert report.predicted.fwd_s == plan.predicted.fwd_s
    assert report.predicted.peak_memory_bytes == plan.predicted.peak_memory_bytes


def test_effective_tokens_per_iteration_survive_the_simulation():
    plan = make_plan()
    old, new = plan.predicted, simulate_plan(plan).predicted
    assert new.effective_tokens_per_s * new.iteration_s == pytest.approx(
        old.effective_tokens_per_s * old.iteration_s
    )


@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_more_iterations_than_scheduled_can_be_played(template):
    report = simulate_plan(make_plan(template=template), iterations=7)
    assert report.predicted.scheduled_iterations == 7


def test_flush_repeats_with_the_period_of_its_one_scheduled_iteration():
    plan = make_plan(template="flush")
    assert plan.predicted.scheduled_iterations == 1
    repeated = simulate_plan(plan, iterations=5).predicted
    assert repeated.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=RELATIVE)


def test_repeated_iterations_keep_the_turns_of_instances():
    plan = make_plan(template="flush")
    instances = [htask.id for htask in plan.htasks]
    stages = build_schedule(
        plan.buckets,
        plan.microbatches,
        pp=plan.parallelism.pp,
        template="flush",
        steps=[1] * len(instances),
        instances=instances,
    )
    plan = changed(
        plan,
        htasks=tuple(htask.model_copy(update={"instance": htask.id}) for htask in plan.htasks),
        schedule=entries(stages),
    )
    scheduled, repeated = simulate_plan(plan).predicted, simulate_plan(plan, iterations=1).predicted
    assert repeated.makespan_s == scheduled.makespan_s > make_plan(template="flush").predicted.makespan_s


def test_no_iterations_are_refused():
    with pytest.raises(SpecError, match="iterations = 0: expected at least 1"):
        simulate_plan(make_plan(), iterations=0)


@pytest.mark.parametrize(("mode", "tp"), [*product(MODES, (1, 2))])
@pytest.mark.parametrize("template", ["flush", "continuous", "gpipe", "lorapp"])
def test_operators_predict_what_the_plan_says(mode, tp, template):
    plan = orchestrated_plan(mode, tp=tp, template=template)
    whole = simulate_plan(plan)
    report = simulate_operators(plan, costs())
    assert len(report.operators) > 500
    alone = report.predicted.iteration_s
    assert alone == pytest.approx(whole.predicted.iteration_s, rel=RELATIVE)
    assert alone == pytest.approx(plan.predicted.iteration_s, rel=RELATIVE)
    assert {s.stream for s in report.operators} == ({"compute", COMMUNICATION} if tp > 1 else {"compute"})


def test_the_planner_and_the_operators_agree_on_every_number():
    given = make_problem(ranks=2)
    htasks = tuple(HTaskChoice(task_ids=(i,), shape=given.shape((i,), "pack")) for i in given.data)
    structure = PlanStructure(
        htasks=htasks,
        buckets=tuple((h,) for h in range(len(htasks))),
        template="continuous",
        mesh=Mesh((2, 2)),
    )
    plan = assemble_plan(given, structure, "muxtune")
    simulated = simulate_operators(plan, given.costs).predicted
    for name in set(Predicted.model_fields) - {
        "clock_s",
        "alignment",
        "theoretical_bubble_fraction",
        "made_for",
        "mfu",
    }:
        expected = np.asarray(getattr(plan.predicted, name))
        assert np.asarray(getattr(simulated, name)) == pytest.approx(expected, rel=RELATIVE), name
    assert simulated.theoretical_bubble_fraction == plan.predicted.theoretical_bubble_fraction


def test_interleaving_shortens_the_iteration_and_contention_takes_it_back():
    def iteration_s(mode, contention):
        plan = orchestrated_plan(mode, pp=1, contention=contention)
        return simulate_operators(plan, costs()).predicted.iteration_s

    sequential = iteration_s("sequential", 0.0)
    assert iteration_s("interleaved", 0.0) < 0.95 * sequential
    assert iteration_s("interleaved", 0.0) < iteration_s("interleaved", 0.5) < sequential


def test_noise_is_reproducible_and_moves_the_iteration_time():
    plan = orchestrated_plan("interleaved")
    quiet = simulate_operators(plan, costs())
    noisy, again, other = (simulate_operators(plan, costs(), noise=0.1, seed=seed) for seed in (1, 1, 2))
    assert noisy.spans == again.spans
    assert list(noisy.operators) == list(again.operators)
    assert noisy.predicted.iteration_s not in {quiet.predicted.iteration_s, other.predicted.iteration_s}
    assert noisy.predicted.iteration_s == pytest.approx(quiet.predicted.iteration_s, rel=0.05)


def test_nothing_is_recorded_where_nobody_asks():
    report = simulate_operators(orchestrated_plan("sequential"), costs(), record=False)
    assert not list(report.operators)


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_has_every_operator_inside_its_action(mode, tmp_path):
    report = simulate_operators(orchestrated_plan(mode), costs())
    report.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert set(tracks.values()) == {
        track_name(stage, stream) for stage in (0, 1) for stream in (COMPUTE, COMMUNICATION)
    }
    lasting = [span for span in report.operators if span.end_s - span.start_s > 1e-9]
    assert len(events) == len(report.spans) + len(lasting)
    for event, parents in zip(events, perfetto_stacks(events), strict=True):
        if event["cat"] == "operator" and tracks[event["tid"]].endswith(COMPUTE):
            assert event["args"]["action"] in parents
        elif event["cat"] == "operator":
            assert (event["name"], parents) == ("all_reduce", [])
    assert {(s.stage, s.stream, s.action) for s in load_trace(tmp_path / "trace.json")} == {
        (s.stage, s.stream, s.action) for s in report.spans
    }


def test_more_iterations_than_scheduled_are_played_operator_by_operator():
    plan = orchestrated_plan("interleaved")
    report = simulate_operators(plan, costs(), iterations=3)
    assert report.predicted.scheduled_iterations == 3
    assert report.predicted.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=RELATIVE)


def test_the_costs_of_a_plan_are_found_again():
    plan = orchestrated_plan("sequential")
    assert plan_costs(plan).ref == plan.costs


def test_a_cpu_plan_needs_its_profile(tmp_path):
    plan = make_plan()
    with pytest.raises(SpecError, match="profile = None: expected the file of made-up, which the plan"):
        plan_costs(plan)
    path = tmp_path / "other.parquet"
    save_profile(make_profile(analytic_law(), operators()), path)
    with pytest.raises(SpecError, match="expected made-up, which the plan was made with"):
        plan_costs(plan, path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pp", [1, 2])
def test_the_launch_order_of_a_plan_is_played(mode, pp):
    plan = launched_plan(mode, pp=pp)
    played = simulate_operators(plan, costs()).predicted
    assert played.iteration_s == pytest.approx(plan.predicted.iteration_s, rel=RELATIVE)
    assert np.asarray(played.bwd_s) == pytest.approx(np.asarray(plan.predicted.bwd_s), rel=RELATIVE)


def test_another_launch_order_in_the_plan_is_another_simulation():
    plan = launched_plan("interleaved", pp=1)
    edited = []
    for clock in plan.orchestration.launches:  # one hTask after the other, and one kernel after the other
        (order,) = clock.orders
        turns = {name: decode_turns(getattr(order, name)) for name in ("compute", "communication")}
        texts = {name: encode_turns(sorted(each)) for name, each in turns.items()}
        orders = (order.model_copy(update={"barrier": "launch", **texts}),)
        edited.append(clock.model_copy(update={"orders": orders}))
    orchestration = plan.orchestration.model_copy(update={"launches": tuple(edited)})
    slow = finish_plan(changed(plan, orchestration=orchestration))
    check_plan(slow)
    sequential = simulate_operators(launched_plan("sequential", pp=1), costs()).predicted.iteration_s
    played = simulate_operators(slow, costs()).predicted.iteration_s
    assert played == pytest.approx(sequential, rel=RELATIVE)
    assert played > 1.02 * plan.predicted.iteration_s
