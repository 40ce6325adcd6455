"""Two streams: exact against hand calculations and a reference that knows no events."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment

from sim.program import Launches, Program
from sim.streams import Recording, play_program, program_seconds
from tests.sampling import examples
from tests.sim.programs import node, programs


def played(program, contention=0.0):
    env, recording = Environment(), Recording()
    env.process(
        play_program(
            env,
            program,
            compute_s=program.compute_s,
            communication_s=program.communication_s,
            slowdown=1 + contention,
            recording=recording,
        )
    )
    env.run()
    return recording


def reference(program, contention):
    """Exact ends of both streams: advance to the next moment at which anything changes, in rationals."""
    left = [[Fraction(s) for s in program.compute_s], [Fraction(s) for s in program.communication_s]]
    needs = [program.compute_needs, program.communication_needs]
    done = [0, 0]
    ends = [[], []]
    now = Fraction(0)
    while done != [len(left[0]), len(left[1])]:
        runs = [done[i] < len(left[i]) and needs[i][done[i]] <= done[1 - i] for i in range(2)]
        rate = 1 / (1 + Fraction(contention)) if all(runs) else Fraction(1)
        step = min(left[i][done[i]] for i in range(2) if runs[i])
        now += step / rate
        for i in range(2):
            if runs[i]:
                left[i][done[i]] -= step
        for i in [i for i in range(2) if runs[i] and not left[i][done[i]]]:
            ends[i].append(now)
            done[i] += 1
    return ends


def test_two_kernels_that_overlap_slow_each_other_down():
    # Compute 3 s beside communication 1 s, contention 0.5: 1 s of both takes 1.5 s, the other 2 s run alone.
    program = Program.launched(
        {0: (node(3), node(1, stream="communication"))},
        Launches(compute=((0, 0),), communication=((0, 1),)),
    )
    recording = played(program, contention=0.5)
    assert recording.communication_s == [0.0, 1.5]
    assert recording.compute_s == [0.0, 3.5]


def test_an_all_reduce_runs_under_the_other_htask():
    # hTask 0: compute 2, communicate 3, compute 1. hTask 1: compute 4, communicate 1, compute 1.
    #
    #   compute        0 0 1 1 1 1 1 0 . 1       contention 0: ends at 2, 6, 7, 8
    #   communication  . . 0 0 0 . 1 .           from 2 to 5, and 6 to 7
    graphs = {
        h: (node(a), node(b, 0, stream="communication"), node(1, 1)) for h, a, b in [(0, 2, 3), (1, 4, 1)]
    }
    order = Launches(compute=((0, 0), (1, 0), (0, 2), (1, 2)), communication=((0, 1), (1, 1)))
    program = Program.launched(graphs, order)
    assert played(program) == Recording([0, 2, 2, 6, 6, 7, 7, 8], [2, 5, 6, 7])
    # Contention 1: hTask 0's 3 s take 6 s beside hTask 1's compute, whose last second runs alone; then 0's
    # compute and 1's communication, a second each, take 2 s together.
    assert played(program, contention=1.0) == Recording([0, 2, 2, 9, 9, 11, 11, 12], [2, 8, 9, 11])


@given(programs(), st.sampled_from([0.0, 0.25, 1.0, 3.0]))
@settings(max_examples=examples(200))
def test_ends_are_those_of_exact_arithmetic(program, contention):
    expected = reference(program, contention)
    recording = played(program, contention)
    for ends, times_s in zip(expected, (recording.compute_s, recording.communication_s), strict=True):
        assert times_s[1::2] == pytest.approx([float(end) for end in ends], rel=1e-12, abs=1e-12)


@given(programs(), st.floats(0, 4), st.floats(0, 4))
@settings(max_examples=examples(200))
def test_time_grows_in_proportion_to_contention(program, a, b):
    # While both streams are busy they do equal work whatever the contention, so the order of events does not
    # depend on it, and each second of overlap costs `contention` seconds more.
    alone_s = program_seconds(program)
    overlap_s = program_seconds(program, 1.0) - alone_s
    assert overlap_s >= -1e-12
    for contention in (a, b):
        expected = alone_s + contention * overlap_s
        assert program_seconds(program, contention) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(programs(), st.sampled_from([0.0, 0.5]))
@settings(max_examples=examples(100))
def test_a_stream_runs_one_kernel_at_a_time_and_after_its_inputs(program, contention):
    recording = played(program, contention)
    columns = (
        (program.compute, recording.compute_s, recording.communication_s),
        (program.communication, recording.communication_s, recording.compute_s),
    )
    for kernels, own_s, other_s in columns:
        assert own_s == sorted(own_s)
        assert len(own_s) == 2 * len(kernels)
        for kernel, start_s in zip(kernels, own_s[::2], strict=True):
            if kernel.needs:
                assert other_s[2 * kernel.needs - 1] <= start_s


@given(programs())
@settings(max_examples=examples(100))
def test_two_streams_take_at_least_the_work_of_one_and_at_most_that_of_both(program):
    seconds = program_seconds(program)
    longest_s = max(sum(program.compute_s), sum(program.communication_s))
    assert longest_s * (1 - 1e-12) <= seconds <= program.work_s * (1 + 1e-12) + 1e-12
