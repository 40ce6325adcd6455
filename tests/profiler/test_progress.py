"""The time that is left is told from the start, steadily, and rightly."""

import random
from itertools import pairwise

import pytest

from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import Overlap
from muxtune.graph.operators import FWD_ONLY, LINK_KINDS, PHASES, Operator
from muxtune.model import PRESETS
from profiler.jobs import plan_job
from profiler.progress import Outlook, shown
from profiler.timing import Sample
from profiler.worker_protocol import Reading
from tests.profiler.test_jobs import overlap

JOB = plan_job(PRESETS["llama-tiny"], "cpu", 2, kinds=PLAIN_KINDS, link_ranks=2, quick=False)
SAMPLE = Sample(1e-3, 1e-3, 1e-3, 5)


def lines():
    for kind, dims in JOB.links:
        yield Reading(Operator(kind, dims), "fwd", SAMPLE)
        if kind == "p2p":
            yield Reading(Operator("message", dims), "fwd", SAMPLE)
    yield from map(overlap, JOB.overlaps)
    for kind, dims in JOB.operators:
        for phase in PHASES[:1] if kind in FWD_ONLY else PHASES:
            yield Reading(Operator(kind, dims), phase, SAMPLE)
            yield Reading(Operator(kind, dims), phase, SAMPLE)


def expected_s(line):
    """Seconds that a line takes if operators use up their limit."""
    if isinstance(line, Overlap):
        return 8 * JOB.limit_s
    if line.op.kind in LINK_KINDS:
        return 0.0 if line.op.kind == "message" else JOB.limit_s
    return JOB.limit_s / JOB.ranks


@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
def test_the_estimate_is_right_from_a_tenth_on_and_never_jumps(factor):
    now_s, rng = 0.0, random.Random(1)
    outlook = Outlook(JOB, lambda: now_s)
    start_s = now_s = 4.0
    all_lines = list(lines())
    told = []
    for line in all_lines:
        now_s += factor * expected_s(line) * rng.choice((0.2, 1.0, 1.8))
        outlook.saw(line)
        told.append((now_s, outlook.left_s, outlook.done))
    assert told[-1][1] == pytest.approx(0.0, abs=1e-6)
    assert told[-1][2] == pytest.approx(1.0)
    whole_s = now_s - start_s
    for at_s, left_s, done in told:
        if done > 0.1:
            # What was expected beforehand weighs a fifth at first, and readings differ by a factor of nine.
            assert at_s - start_s + left_s == pytest.approx(whole_s, rel=0.35 if done < 0.3 else 0.15)
    jumps = [b[1] - a[1] for a, b in pairwise(told) if a[2] > 0.1]
    assert max(jumps) < 0.02 * whole_s


def test_where_no_terminal_is_a_line_says_how_far_it_is(capsys):
    with shown(JOB, wanted=True) as saw:
        for line in lines():
            saw(line)
    (line,) = capsys.readouterr().err.splitlines()  # then not again for 15 seconds
    assert line.startswith("muxtune: profiling llama-tiny on cpu: 0%, about ")
    with shown(JOB, wanted=False) as saw:
        saw(next(iter(lines())))
    assert capsys.readouterr().err == ""
