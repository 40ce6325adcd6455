"""Schedules: what the generator guarantees for every problem, and what the checker refuses."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings

from muxtune.errors import SpecError
from muxtune.schedule import (
    Action,
    ScheduleError,
    build_schedule,
    check_schedule,
    find_deadlock,
    injection_order,
    render_schedule,
)
from tests.muxtune.schedules import Problem, play_with_bounded_channels, problems

EXAMPLES = 150


def grid(*stages: str) -> list[list[Action]]:
    return [[Action.parse(word) for word in stage.split()] for stage in stages]


def in_flight_after_each_action(actions: list[Action]) -> list[int]:
    open_, counts = 0, []
    for action in actions:
        open_ += {"F": 1, "B": -1, "STEP": 0}[action.kind]
        counts.append(open_)
    return counts


@given(problems())
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_checker_accepts_what_the_generator_builds(problem: Problem):
    check_schedule(problem.build(), problem.microbatches)


@given(problems())
@settings(max_examples=EXAMPLES, deadline=None)
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
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_stage_keeps_at_most_pp_minus_stage_micro_batches_in_flight(problem: Problem):
    for stage, actions in enumerate(problem.build()):
        counts = in_flight_after_each_action(actions)
        assert min(counts) >= 0
        assert max(counts) <= problem.pp - stage


@given(problems())
@settings(max_examples=EXAMPLES, deadline=None)
def test_all_stages_run_forwards_backwards_and_steps_in_one_order(problem: Problem):
    stages = problem.build()
    for kind in ("F", "B", "STEP"):
        orders = [[(a.htask, a.number) for a in actions if a.kind == kind] for actions in stages]
        assert all(order == orders[0] for order in orders)
    # Backwards follow in the order of the forwards, so a channel never holds the wrong tensor in front.
    forwards, backwards = ([(a.htask, a.number) for a in stages[0] if a.kind == k] for k in ("F", "B"))
    assert forwards == backwards


@given(problems())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_step_follows_its_backwards_and_precedes_the_forwards_of_the_next(problem: Problem):
    for actions in problem.build():
        at = {action: slot for slot, action in enumerate(actions)}
        for h, (m, steps) in enumerate(zip(problem.microbatches, problem.steps, strict=True)):
            for k in range(steps):
                step = at[Action("STEP", h, k)]
                assert step == 1 + max(at[Action("B", h, n)] for n in range(k * m, (k + 1) * m))
                if k + 1 < steps:
                    assert step < min(at[Action("F", h, n)] for n in range((k + 1) * m, (k + 2) * m))


@pytest.mark.parametrize("capacity", [1, 2])
@given(problem=problems())
@settings(max_examples=EXAMPLES, deadline=None)
def test_bounded_channels_never_deadlock(problem: Problem, capacity: int):
    assert play_with_bounded_channels(problem.build(), capacity)


def test_the_bounded_channels_of_the_tests_do_find_deadlocks():
    waiting_for_each_other = grid("F0.0 B0.0 F0.1 B0.1 STEP0.0", "F0.0 F0.1 B0.0 B0.1 STEP0.0")
    assert not play_with_bounded_channels(waiting_for_each_other, 9)
    # Stage 0 sends four before it reads; with room for one, stage 1 is stuck with B0.1 when it has read two.
    greedy = grid("F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3", "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3")
    assert not play_with_bounded_channels(greedy, 1)
    assert play_with_bounded_channels(greedy, 2)


@given(problems(templates=["flush"]))
@settings(max_examples=EXAMPLES, deadline=None)
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
@settings(max_examples=EXAMPLES, deadline=None)
def test_continuous_holds_back_only_for_the_own_step_of_an_htask(problem: Problem):
    """Independent of the generator: a backward runs only if the next forward must not."""
    for stage, actions in enumerate(problem.build()):
        remaining = [a for a in actions if a.kind == "F"]
        stepped = Counter()
        open_ = 0
        for action in actions:
            if action.kind == "STEP":
                stepped[action.htask] += 1
            elif action.kind == "F":
                remaining.pop(0)
                open_ += 1
            else:
                full = open_ == problem.pp - stage
                held_back = remaining and (
                    remaining[0].number // problem.microbatches[remaining[0].htask]
                    > stepped[remaining[0].htask]
                )
                assert full or held_back or not remaining
                open_ -= 1


def others_between_own_steps(order: list[tuple[int, int]], htasks: int) -> int:
    """Fewest micro-batches of others between an hTask's last of one iteration and its first of the next."""
    twice = [h for h, _ in order] * 2
    n = len(order)
    last = {h: max(i for i in range(n) if twice[i] == h) for h in range(htasks)}
    return min(twice.index(h, n) - last[h] - 1 for h in range(htasks))


@given(problems(templates=["continuous"], equal_steps=True))
@settings(max_examples=2 * EXAMPLES, deadline=None)
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


@given(problems(equal_steps=True))
@settings(max_examples=60, deadline=None)
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
                    check_schedule(broken, problem.microbatches)


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
@settings(max_examples=30, deadline=None)
def test_actions_are_parsed_back_from_their_text(problem: Problem):
    for action in problem.build()[0]:
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "F0.0.0", "W0.0", "F-1.0", "F0.0 ", "f0.0", "STEP.0"])
def test_text_that_is_no_action_is_refused(text):
    with pytest.raises(SpecError, match=r"expected such as F0\.1, B0\.1 or STEP0\.0"):
        Action.parse(text)
