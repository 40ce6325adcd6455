"""Random schedules with random durations."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from muxtune.schedule import Action, build_schedule
from muxtune.timeline import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    stages: list[list[Action]]
    times: StageTimes
    microbatches: tuple[int, ...]


@st.composite
def cases(draw: st.DrawFn, *, may_contend: bool) -> Case:
    """A transfer that takes no longer than any action never meets the next one on its link."""
    pp = draw(st.integers(1, 6))
    htasks = draw(st.integers(1, 5))
    microbatches = tuple(draw(st.lists(st.integers(1, 5), min_size=htasks, max_size=htasks)))
    order = draw(st.permutations(range(htasks)))
    cuts = sorted(draw(st.sets(st.integers(1, htasks - 1)))) if htasks > 1 else []
    buckets = [order[i:j] for i, j in zip([0, *cuts], [*cuts, htasks], strict=True)]
    seconds = st.floats(1e-4, 1.0)
    table = st.lists(st.lists(seconds, min_size=htasks, max_size=htasks), min_size=pp, max_size=pp)
    fwd_s, bwd_s = draw(table), draw(table)
    longest_s = 2.0 if may_contend else min(map(min, fwd_s + bwd_s))
    p2p_s = draw(st.lists(st.floats(0.0, longest_s), min_size=htasks, max_size=htasks))
    stages = build_schedule(
        buckets,
        microbatches,
        pp=pp,
        template=draw(st.sampled_from(["flush", "continuous"])),
        steps=draw(st.lists(st.integers(1, 4), min_size=htasks, max_size=htasks)),
    )
    times = StageTimes(fwd_s=fwd_s, bwd_s=bwd_s, p2p_s=p2p_s)
    return Case(stages=stages, times=times, microbatches=microbatches)
