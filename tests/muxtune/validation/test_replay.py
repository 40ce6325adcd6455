"""The replay against the recurrence that predicts, and against clocks where stages meet."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from muxtune.schedule import Action, evaluate_schedule
from muxtune.validation.replay import (
    ClockTiming,
    Moment,
    iteration_ends_s,
    iteration_lengths_s,
    replay,
)
from tests.muxtune.schedule.test_recurrence_parity import schedules
from tests.sampling import examples


@settings(max_examples=examples(100))
@given(schedules())
def test_with_the_durations_of_classes_it_is_the_recurrence(drawn):
    stages, times = drawn
    clocks = [[(action,) for action in actions] for actions in stages]

    def timing(stage, position):
        action = stages[stage][position]
        return ClockTiming(
            transfer_s=0.0 if action.kind == "STEP" else times.p2p_s[action.htask],
            busy_s=times.duration_s(stage, action),
        )

    played = replay(clocks, timing)
    ends_s = [moment.end_s for moments in played for moment in moments]
    assert ends_s == pytest.approx([span.end_s for span in evaluate_schedule(stages, times)], rel=1e-12)


F, B, STEP = Action("F", 0, 0), Action("B", 0, 0), Action("STEP", 0, 0)


def test_every_time_of_a_clock_has_its_place():
    """Stage 1: gap 1, lead 2 until 3; the tensor comes at 10 + 4; busy 5 until 19."""
    timings = {0: ClockTiming(busy_s=10.0), 1: ClockTiming(gap_s=1.0, lead_s=2.0, transfer_s=4.0, busy_s=5.0)}
    played = replay([[(F,)], [(F,)]], lambda stage, position: timings[stage])
    assert played[1] == [Moment(3.0, 14.0, 19.0)]


def test_stages_that_meet_go_on_together():
    busy_s = {(0, 0): 1.0, (1, 0): 7.0}
    played = replay(
        [[(B,), (STEP,)], [(B,), (STEP,)]],
        lambda stage, position: ClockTiming(busy_s=busy_s.get((stage, position), 2.0), sync_s=0.5 * position),
        lambda clock: clock == (STEP,),
    )
    # B of stage 0 follows that of stage 1, at 7 + 1
    assert [moments[1] for moments in played] == [Moment(8.0, 8.5, 10.5), Moment(7.0, 8.5, 10.5)]
    ends_s = iteration_ends_s([[(B,), (STEP,)]] * 2, played)
    assert ends_s == {0: 10.5}


def test_iterations_follow_each_other():
    assert iteration_lengths_s({4: 3.0, 5: 10.0, 6: 11.0}) == {4: 3.0, 5: 7.0, 6: 1.0}


def test_a_schedule_that_deadlocks_is_refused():
    with pytest.raises(RuntimeError, match="deadlocks"):
        replay([[(B,), (F,)], [(F,), (B,)]], lambda stage, position: ClockTiming(busy_s=1.0))
