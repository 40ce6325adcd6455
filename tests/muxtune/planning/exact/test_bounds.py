"""Bounds against played schedules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.planning.exact.bounds import IterationBounds, bound_terms, exact_bounds
from muxtune.planning.exact.seconds import HTaskTimes
from muxtune.schedule import StageTimes, inject, injected_iteration_s
from tests.sampling import examples


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[HTaskTimes], list[int], list[tuple[int, ...]]]:
    """HTasks with their micro-batches, and an order of single ones or pairs."""
    pp, count = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    times = []
    for _ in range(count):
        scale = rng.choice([1.0, 5.0])
        fwd, bwd = (tuple((scale * rng.uniform(0.5, 1.5, pp)).tolist()) for _ in range(2))
        times.append(HTaskTimes(fwd, bwd, float(rng.choice([0.0, 0.3]))))
    order = rng.permutation(count).tolist()
    step = draw(st.integers(1, 2))
    return (
        times,
        rng.integers(1, 5, count).tolist(),
        [tuple(order[i : i + step]) for i in range(0, count, step)],
    )


@settings(max_examples=examples(200))
@given(pipelines(), st.sampled_from(["continuous", "flush"]))
def test_no_schedule_is_faster_than_its_bound(pipeline, template):
    times, microbatches, buckets = pipeline
    pp = len(times[0].fwd_s)
    steps = [4 if template == "continuous" else 1] * len(times)
    stage_times = StageTimes(
        fwd_s=[[t.fwd_s[s] for t in times] for s in range(pp)],
        bwd_s=[[t.bwd_s[s] for t in times] for s in range(pp)],
        p2p_s=[t.p2p_s for t in times],
    )
    injection = inject(buckets, microbatches, template=template, steps=steps)
    seconds = injected_iteration_s(injection, stage_times)
    assert exact_bounds(times, microbatches).of([template]) <= seconds * (1 + 1e-9)


def test_bounds_of_one_htask_are_its_own_pass():
    half = np.array([[1.0], [1.5]])
    bounds = bound_terms(half, half, np.array([4.0]), np.array([0.5])).together()
    # Through stage 0 and a transfer each way, then four micro-batches on stage 1.
    assert bounds == IterationBounds(load_s=12.0, continuous_s=15.0, flush_s=15.0)


def test_the_better_template_counts():
    bounds = IterationBounds(load_s=1.0, continuous_s=2.0, flush_s=3.0)
    assert bounds.of(["continuous", "flush"]) == pytest.approx(2.0)
    assert bounds.of(["flush"]) == pytest.approx(3.0)
