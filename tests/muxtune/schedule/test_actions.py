"""Schedules: what the generator guarantees for every problem, and what the checker refuses."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.schedule import (
    Action,
    build_schedule,
    check_schedule,
    clocks_in_flight,
    clocks_of,
    injection_order,
    shared_clocks,
)
from muxtune.schedule.actions import ScheduleError, render_schedule
from muxtune.schedule.check import find_deadlock
from muxtune.support.errors import SpecError
from tests.muxtune.schedule.schedules import Problem, play_with_bounded_channels, problems
from tests.sampling import examples

EXAMPLES = examples(150)


def grid(*stages: str) -> list[list[Action]]:
    return [[Action.parse(word) for word in stage.split()] for stage in stages]


def cut(problem: Problem) -> list[list[tuple[Action, ...]]]:
    return [clocks_of(actions, problem.microbatches, problem.shared_buckets) for actions in problem.build()]


def check(problem: Problem, stages: list[list[Action]]) -> None:
    check_schedule(
        stages,
        problem.microbatches,
        buckets=problem.shared_buckets,
        in_flight_limit=problem.template != "gpipe",
    )


def in_flight_after_each_action(actions: list[Action]) -> list[int]:
    open_, counts = 0, []
    for action in actions:
        open_ += {"F": 1, "B": -1, "STEP": 0}[action.kind]
        counts.append(open_)
    return counts


@given(problems())
@settings(max_examples=EXAMPLES)
def test_the_checker_accepts_what_the_generator_builds(problem: Problem):
    check(problem, problem.build())


@given(problems())
@settings(max_examples=EXAMPLES)
def test_every_stage_runs_every_micro_batch_of_every_step_exactly_once(problem: Problem):
    expected = Counter()
    for h, (m, steps) in enumerate(zip(problem.microbatches, problem.steps, strict=True)):
        expected.update(Action(kind, h, n) for kind in ("F", "B") for n in range(m * steps))
        expected.update(Action("STEP", h, k) for k in range(steps))
    stages = problem.build()
    assert len(stages) == problem.pp
    for actions in stages:
        assert Counter(actions) == expected


@given(problems())
@settings(max_examples=EXAMPLES)
def test_a_stage_keeps_at_most_pp_minus_stage_clocks_in_flight(problem: Problem):
    for stage, clocks in enumerate(cut(problem)):
        # A clock, whoever is in it, is one more or one less.
        counts = in_flight_after_each_action([clock[0] for clock in clocks])
        limit = clocks_in_flight(problem.template, problem.microbatches, pp=problem.pp, stage=stage)
        assert limit == (sum(problem.microbatches) if problem.template == "gpipe" else problem.pp - stage)
        assert min(counts) >= 0
        assert max(counts) <= limit


@given(problems())
@settings(max_examples=EXAMPLES)
def test_the_clocks_of_a_list_are_those_of_the_definition(problem: Problem):
    """Kind, iteration, bucket and micro-batch number name a clock; its micro-batches stand in one place."""
    bucket_of = {h: number for number, bucket in enumerate(problem.buckets) for h in bucket}
    for actions, clocks in zip(problem.build(), cut(problem), strict=True):
        assert [a for clock in clocks for a in clock] == actions
        played = [clock for clock in clocks if clock[0].kind != "STEP"]
        if not problem.co_scheduled:
            assert all(len(clock) == 1 for clock in clocks)
            continue
        names = [
            {(a.kind, bucket_of[a.htask], *divmod(a.number, problem.microbatches[a.htask])) for a in clock}
            for clock in played
        ]
        assert all(len(name) == 1 for name in names)
        assert len({name for clock in names for name in clock}) == len(played)
        for (_, bucket, step, position), clock in zip((min(n) for n in names), played, strict=True):
            members = [h for h in problem.buckets[bucket] if step < problem.steps[h]]
            assert [a.htask for a in clock] == [h for h in members if position < problem.microbatches[h]]


@given(problems())
@settings(max_examples=EXAMPLES)
def test_all_stages_run_forwards_backwards_and_steps_in_one_order(problem: Problem):
    stages = problem.build()
    for kind in ("F", "B", "STEP"):
        orders = [[(a.htask, a.number) for a in actions if a.kind == kind] for actions in stages]
        assert all(order == orders[0] for order in orders)
    # Backwards follow in the order of the forwards, so a channel never holds the wrong tensor in front.
    forwards, backwards = ([(a.htask, a.number) for a in stages[0] if a.kind == k] for k in ("F", "B"))
    assert forwards == backwards


@given(problems())
@settings(max_examples=EXAMPLES)
def test_a_step_follows_its_backwards_and_precedes_the_forwards_of_the_next(problem: Problem):
    for actions in problem.build():
        at = {action: slot for slot, action in enumerate(actions)}
        for h, (m, steps) in enumerate(zip(problem.microbatches, problem.steps, strict=True)):
            for k in range(steps):
                step = at[Action("STEP", h, k)]
                last = max(at[Action("B", h, n)] for n in range(k * m, (k + 1) * m))
                between = {a.kind for a in actions[last + 1 : step]}
                assert between <= ({"B", "STEP"} if problem.co_scheduled else set())
                if k + 1 < steps:
                    assert step < min(at[Action("F", h, n)] for n in range((k + 1) * m, (k + 2) * m))


@pytest.mark.parametrize("capacity", [1, 2])
@given(problem=problems())
@settings(max_examples=EXAMPLES)
def test_bounded_channels_never_deadlock(problem: Problem, capacity: int):
    find_deadlock(problem.build(), capacity=capacity, clocks=cut(problem))
    # The tests' own channels hold single tensors, so there must be room for those of a clock.
    together = max(map(len, problem.buckets)) if problem.co_scheduled else 1
    if problem.template != "gpipe":
        assert play_with_bounded_channels(problem.build(), capacity * together)


@given(problems(templates=["gpipe"]))
@settings(max_examples=EXAMPLES)
def test_gpipe_plays_all_forwards_of_an_iteration_then_all_its_backwards(problem: Problem):
    for actions in problem.build():
        played = [a for a in actions if a.kind != "STEP"]
        of_iteration = [(a.number // problem.microbatches[a.htask], a.kind == "B") for a in played]
        assert of_iteration == sorted(of_iteration)


@given(problems(templates=["lorapp"], may_share=False))
@settings(max_examples=EXAMPLES)
def test_lorapp_has_one_micro_batch_of_an_htask_on_its_way(problem: Problem):
    for actions in problem.build():
        on_the_way: Counter[int] = Counter()
        for action in actions:
            on_the_way[action.htask] += {"F": 1, "B": -1, "STEP": 0}[action.kind]
            assert on_the_way[action.htask] <= 1


def test_lorapp_spreads_the_micro_batches_of_an_iteration():
    stages = build_schedule([[0, 1]], [4, 2], pp=1, template="lorapp", steps=[1, 1])
    assert [a.htask for a in stages[0] if a.kind == "F"] == [0, 1, 0, 0, 1, 0]


def test_the_bounded_channels_of_the_tests_do_find_deadlocks():
    waiting_for_each_other = grid("F0.0 B0.0 F0.1 B0.1 STEP0.0", "F0.0 F0.1 B0.0 B0.1 STEP0.0")
    assert not play_with_bounded_channels(waiting_for_each_other, 9)
    # Stage 0 sends four before it reads; with room for one, stage 1 is stuck with B0.1 when it has read two.
    greedy = grid("F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3", "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3")
    assert not play_with_bounded_channels(greedy, 1)
    assert play_with_bounded_channels(greedy, 2)
    with pytest.raises(ScheduleError, match=r"schedule\[0\]\[3\]: F0.3 waits for ever"):
        find_deadlock(greedy, capacity=1)
    find_deadlock(greedy, capacity=2)


@given(problem=problems(max_pp=6), data=st.data())
@settings(max_examples=EXAMPLES)
def test_the_dry_run_agrees_with_the_channels_of_the_tests_on_broken_schedules(problem: Problem, data):
    """Two actions of a stage swapped: the one notices whenever the other does."""
    stages = problem.build()
    actions = stages[data.draw(st.integers(0, problem.pp - 1))]
    i, j = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions[i], actions[j] = actions[j], actions[i]
    for capacity in (1, 2, 3):
        if play_with_bounded_channels(stages, capacity):
            find_deadlock(stages, capacity=capacity)
        else:
            with pytest.raises(ScheduleError, match="waits for ever"):
                find_deadlock(stages, capacity=capacity)


@given(problems(templates=["flush", "gpipe"]))
@settings(max_examples=EXAMPLES)
def test_flush_drains_between_iterations(problem: Problem):
    for actions in problem.build():
        counts = in_flight_after_each_action(actions)
        step_of = [
            a.number if a.kind == "STEP" else a.number // problem.microbatches[a.htask] for a in actions
        ]
        assert step_of == sorted(step_of)
        for slot, (this, following) in enumerate(pairwise(step_of)):
            if following != this:
                assert counts[slot] == 0


@given(problems(templates=["continuous"]))
@settings(max_examples=EXAMPLES)
def test_continuous_holds_back_only_for_the_own_step_of_an_htask(problem: Problem):
    """Independent of the generator: a clock goes back only if the next must not go forward.

    An F of step k + 1 comes after its own STEP k and needs no other's.
    """
    for stage, clocks in enumerate(cut(problem)):
        remaining = [clock for clock in clocks if clock[0].kind == "F"]
        stepped = Counter()
        open_ = 0
        for clock in clocks:
            if clock[0].kind == "STEP":
                stepped[clock[0].htask] += 1
            elif clock[0].kind == "F":
                remaining.pop(0)
                open_ += 1
            else:
                full = open_ == problem.pp - stage
                held_back = remaining and any(
                    a.number // problem.microbatches[a.htask] > stepped[a.htask] for a in remaining[0]
                )
                assert full or held_back or not remaining
                open_ -= 1


def others_between_own_steps(order: list[tuple[int, int]], htasks: int) -> int:
    """Fewest micro-batches of others between an hTask's last of one iteration and its first of the next."""
    twice = [h for h, _ in order] * 2
    n = len(order)
    last = {h: max(i for i in range(n) if twice[i] == h) for h in range(htasks)}
    return min(twice.index(h, n) - last[h] - 1 for h in range(htasks))


@given(problems(templates=["continuous"], equal_steps=True, may_share=False, max_pp=8))
@settings(max_examples=2 * EXAMPLES)
def test_continuous_stays_full_where_pp_others_stand_between_two_steps_of_each_htask(problem: Problem):
    """With so many others in between, waiting for the own step never costs a slot: plain 1F1B throughout."""
    order = injection_order(problem.buckets, problem.microbatches)
    others = others_between_own_steps(order, len(problem.microbatches))
    actions = problem.build()[0]
    last_forward = max(slot for slot, a in enumerate(actions) if a.kind == "F")
    counts = in_flight_after_each_action(actions)[:last_forward]
    full = next((slot for slot, open_ in enumerate(counts) if open_ == problem.pp), len(counts))
    if others >= problem.pp - 1:
        assert min(counts[full:], default=problem.pp) >= problem.pp - 1
    elif others >= 1:
        assert min(counts[1:], default=1) >= 1  # somebody else is always under way: no full drain


def test_continuous_does_not_drain_between_iterations_and_flush_does():
    arguments = {"buckets": [[0], [1], [2]], "microbatches": [1, 1, 1], "pp": 2, "steps": [2, 2, 2]}
    continuous = build_schedule(template="continuous", **arguments)
    flush = build_schedule(template="flush", **arguments)
    assert " ".join(map(str, continuous[0])) == (
        "F0.0 F1.0 B0.0 STEP0.0 F2.0 B1.0 STEP1.0 "
        "F0.1 B2.0 STEP2.0 F1.1 B0.1 STEP0.1 F2.1 B1.1 STEP1.1 B2.1 STEP2.1"
    )
    assert " ".join(map(str, flush[0])) == (
        "F0.0 F1.0 B0.0 STEP0.0 F2.0 B1.0 STEP1.0 B2.0 STEP2.0 "
        "F0.1 F1.1 B0.1 STEP0.1 F2.1 B1.1 STEP1.1 B2.1 STEP2.1"
    )


def test_an_htask_with_fewer_steps_leaves_the_rotation():
    (actions,) = build_schedule([[0], [1]], [1, 1], pp=1, template="continuous", steps=[3, 1])
    assert [str(a) for a in actions if a.kind == "F"] == ["F0.0", "F1.0", "F0.1", "F0.2"]


def test_htasks_of_one_bucket_take_turns_and_buckets_follow_each_other():
    assert injection_order([[2, 0], [1]], [1, 2, 3]) == [(2, 0), (0, 0), (2, 1), (2, 2), (1, 0), (1, 1)]


VALID = "F0.0 F0.1 B0.0 F1.0 B0.1 STEP0.0 B1.0 STEP1.0", "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0"
TWO_STEPS = "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0 F0.2 B0.2 F0.3 B0.3 STEP0.1"
VIOLATIONS = {
    "forward order": (
        ["F0.1 F0.0 B0.1 F1.0 B0.0 STEP0.0 B1.0 STEP1.0", VALID[1]],
        "schedule[1][0]: F order differs from that of stage 0",
    ),
    "backward order": (
        ["F0.0 F0.1 B0.1 F1.0 B0.0 STEP0.0 B1.0 STEP1.0", VALID[1]],
        "schedule[1][1]: B order differs from that of stage 0",
    ),
    "missing B": (
        [VALID[0], "F0.0 B0.0 F1.0 B1.0 STEP1.0 F0.1"],
        "schedule[1][5]: micro-batch 0.0 is not part of a whole step",
    ),
    "missing STEP": (
        [VALID[0], "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0"],
        "schedule[1][6]: micro-batch 1.0 is not part of a whole step",
    ),
    "missing half of a step": (
        [VALID[0], "F0.0 B0.0 F1.0 B1.0 STEP1.0"],
        "schedule[1][4]: micro-batch 0.0 is not part of a whole step",
    ),
    "F twice": (
        ["F0.0 F0.0 B0.0 F1.0 B0.1 STEP0.0 B1.0 STEP1.0", VALID[1]],
        "schedule[0][1]: F0.0 runs twice",
    ),
    "B twice": (
        [VALID[0], "F0.0 B0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0"],
        "schedule[1][2]: B0.0 runs twice",
    ),
    "B before its F": (
        [VALID[0], "F0.0 B0.0 B0.1 F0.1 STEP0.0 F1.0 B1.0 STEP1.0"],
        "schedule[1][2]: B0.1 runs before its F0.1",
    ),
    "unknown hTask": (
        ["F0.0 F0.1 B0.0 F2.0 B0.1 STEP0.0 B2.0 STEP2.0", VALID[1]],
        "schedule[0][3]: F2.0 names an hTask that the plan does not have",
    ),
    "STEP before its backwards": (
        [VALID[0], "F0.0 B0.0 F0.1 STEP0.0 B0.1 F1.0 B1.0 STEP1.0"],
        "schedule[1][3]: STEP0.0 runs before the backwards of step 0 are complete",
    ),
    "STEP twice": (
        [VALID[0] + " STEP0.0", VALID[1]],
        "schedule[0][8]: STEP0.0 runs before the backwards of step 1 are complete",
    ),
    "STEP out of turn": (
        [VALID[0], VALID[1].replace("STEP0.0", "STEP0.1")],
        "schedule[1][4]: STEP0.1 runs before the backwards of step 0 are complete",
    ),
    "next step's F before STEP": (
        [TWO_STEPS.replace("STEP0.0 F1.0 B1.0 STEP1.0 F0.2", "F1.0 B1.0 STEP1.0 F0.2 STEP0.0")],
        "schedule[0][7]: F0.2 runs before STEP0.0",
    ),
    "one too many in flight": (
        [VALID[0], "F0.0 F0.1 B0.0 B0.1 STEP0.0 F1.0 B1.0 STEP1.0"],
        "schedule[1][1]: F0.1 is one more than the 1 allowed in flight",
    ),
    "a stage ends early": (
        [TWO_STEPS, "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0"],
        "schedule[1][7]: F order differs from that of stage 0",
    ),
    "deadlock between stages": (
        [
            "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0",
            "F0.0 F0.1 B0.0 B0.1 STEP0.0 F1.0 B1.0 STEP1.0",
            "F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0",
        ],
        "schedule[0][1]: B0.0 waits for ever (deadlock)",
    ),
}


def test_the_schedules_that_are_mutated_below_are_valid():
    check_schedule(grid(*VALID), [2, 1])
    check_schedule(grid(TWO_STEPS), [2, 1])


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_refused_with_its_spot_and_reason(name):
    texts, message = VIOLATIONS[name]
    stages = grid(*texts)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(stages, [2, 1])
    assert str(caught.value) == message
    assert isinstance(caught.value, SpecError)
    stage, slot = map(int, message.partition(":")[0].removeprefix("schedule[").removesuffix("]").split("]["))
    marked = [line for line in caught.value.grid.splitlines() if "<-" in line]
    assert len(marked) == 1
    assert marked[0].startswith(f"  stage {stage} | ")
    assert marked[0].endswith(f"{stages[stage][slot]}  <- slot {slot}")
    assert len(caught.value.grid.splitlines()) == len(stages)


def test_co_scheduled_htasks_share_clocks():
    stages = build_schedule(
        [[1, 0], [2]], [1, 2, 1], pp=2, template="flush", steps=[1, 1, 1], co_scheduled=True
    )
    first, last = (" ".join(map(str, actions)) for actions in stages)
    assert first == "F1.0 F0.0 F1.1 B1.0 B0.0 STEP0.0 F2.0 B1.1 STEP1.0 B2.0 STEP2.0"
    assert last == "F1.0 F0.0 B1.0 B0.0 STEP0.0 F1.1 B1.1 STEP1.0 F2.0 B2.0 STEP2.0"
    assert shared_clocks([[1, 0], [2]], [1, 2, 1]) == [(1, 0)]
    assert shared_clocks([[1, 0, 2]], [2, 3, 1]) == [(1, 0, 2), (1, 0)]


SHARED = "F0.0 F1.0 B0.0 B1.0 STEP1.0 F0.1 B0.1 STEP0.0"
SHARED_VIOLATIONS = {
    "against the bucket's order": (
        [SHARED.replace("F0.0 F1.0", "F1.0 F0.0")] * 2,
        "schedule[0][1]: F0.0 stands behind F1.0, against the order of their bucket",
    ),
    "clocks that differ between stages": (
        [SHARED.replace("STEP1.0 F0.1", "F0.1 STEP1.0").replace("B0.0 B1.0 F0.1", "B0.0 F0.1 B1.0"), SHARED],
        "schedule[1][2]: the clock of B0.0 differs from that of stage 0",
    ),
    "one clock too many in flight": (
        [SHARED, "F0.0 F1.0 F0.1 B0.0 B1.0 STEP1.0 B0.1 STEP0.0"],
        "schedule[1][2]: F0.1 is one more than the 1 allowed in flight",
    ),
}


@pytest.mark.parametrize("name", SHARED_VIOLATIONS)
def test_a_violation_of_shared_clocks_is_refused(name):
    texts, message = SHARED_VIOLATIONS[name]
    check_schedule(grid(SHARED, SHARED), [2, 1], buckets=[[0, 1]])
    with pytest.raises(ScheduleError) as caught:
        check_schedule(grid(*texts), [2, 1], buckets=[[0, 1]])
    assert str(caught.value) == message


@given(problems(equal_steps=True))
@settings(max_examples=examples(60))
def test_any_two_swapped_actions_of_which_one_needs_the_other_are_refused(problem: Problem):
    stages = problem.build()
    for stage in (0, problem.pp - 1):
        for slot, (a, b) in enumerate(pairwise(stages[stage])):
            own_backward = (a.kind, b.kind) == ("F", "B") and a.number == b.number
            own_step = (a.kind, b.kind) in {("B", "STEP"), ("STEP", "F")}
            if a.htask == b.htask and (own_backward or own_step):
                broken = [list(s) for s in stages]
                broken[stage][slot : slot + 2] = [b, a]
                with pytest.raises(ScheduleError):
                    check(problem, broken)


@pytest.mark.parametrize(("htask", "number"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(htask, number):
    actions = [Action("F", htask, number), Action("B", htask, number)]
    with pytest.raises(ScheduleError):
        check_schedule([actions], [1])


def test_the_in_flight_limit_can_be_lifted_for_other_schedules():
    gpipe = grid("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2 STEP0.0", "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2 STEP0.0")
    with pytest.raises(ScheduleError, match=r"F0\.2 is one more than the 2 allowed in flight"):
        check_schedule(gpipe, [3])
    check_schedule(gpipe, [3], in_flight_limit=False)
    find_deadlock(gpipe)


def test_a_grid_without_a_mark_shows_everything_in_columns():
    assert render_schedule(grid("F0.0 B0.0 STEP0.0", "F10.0")) == (
        "  stage 0 | F0.0     B0.0     STEP0.0\n  stage 1 | F10.0"
    )


def test_a_grid_with_a_mark_shows_only_what_leads_there():
    numbers = " ".join(f"F0.{i}" for i in range(12))
    lines = render_schedule(grid(numbers, numbers), (1, 9)).splitlines()
    assert lines[0].split() == ["stage", "0", "|", *(f"F0.{i}" for i in range(3, 10))]
    assert lines[1] == lines[0].replace("stage 0", "stage 1") + "  <- slot 9"


@given(problems(max_pp=2))
@settings(max_examples=examples(30))
def test_actions_are_parsed_back_from_their_text(problem: Problem):
    for action in problem.build()[0]:
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "F0.0.0", "W0.0", "F-1.0", "F0.0 ", "f0.0", "STEP.0"])
def test_text_that_is_no_action_is_refused(text):
    with pytest.raises(SpecError, match=r"expected such as F0\.1, B0\.1 or STEP0\.0"):
        Action.parse(text)
