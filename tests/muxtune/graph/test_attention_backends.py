"""The choice of an attention backend from measured times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.batches import batched_calls
from muxtune.graph.attention_backends import (
    DEFAULT_ATTENTION,
    MARGIN,
    AttentionContest,
    AttentionTime,
    choose_attention,
    contest_streams,
    kept_calls,
)

DEFAULT_S = (1.0, 10.0, 100.0)
seconds = st.floats(1e-6, 10.0)


def test_a_backend_has_to_win_by_more_than_the_margin():
    def chosen(factor):
        return choose_attention({"grouped": DEFAULT_S, "loop": [factor * each for each in DEFAULT_S]})

    assert chosen(1 - MARGIN + 0.01) == "grouped"
    assert chosen(1 - MARGIN - 0.01) == "loop"


def test_streams_weigh_alike_whatever_they_take():
    # 30 % faster on the longest stream, twice as slow on the shortest.
    assert choose_attention({"grouped": DEFAULT_S, "loop": (2.0, 10.0, 70.0)}) == "grouped"
    assert choose_attention({"grouped": DEFAULT_S, "loop": (0.5, 10.0, 130.0)}) == "loop"


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=4))
def test_the_choice_is_never_slower_on_the_whole_than_the_default(streams):
    default, loop, varlen = zip(*streams, strict=True)
    times = {"grouped": default, "loop": loop, "varlen": varlen}
    contest = AttentionContest(
        streams=((1,),) * len(streams),
        times=tuple(AttentionTime(backend=name, fwd_s=s, bwd_s=s) for name, s in times.items()),
        chosen=choose_attention(times),
    )
    ratios = {name: contest.ratio(name) for name in times}
    assert ratios[DEFAULT_ATTENTION] == pytest.approx(1)
    assert ratios[contest.chosen] == pytest.approx(1) or ratios[contest.chosen] == min(ratios.values())


def test_what_was_not_tried_has_no_ratio():
    tried = AttentionTime(backend="grouped", fwd_s=(1.0,), bwd_s=(2.0,))
    missing = AttentionTime(backend="varlen", missing="a CUDA device")
    contest = AttentionContest(streams=((8, 8),), times=(tried, missing), chosen="grouped")
    assert contest.ratio("varlen") is None
    assert contest.ratio("flex") is None


@pytest.mark.parametrize("longest", [16, 128, 4096])
def test_the_streams_are_many_short_equal_mixed_and_a_long_one(longest):
    short, equal, mixed, long = contest_streams(longest)
    assert max(*short, *mixed, *long) == min(longest, 1024)
    assert len(short) > len(mixed) > len(long) == 1
    assert len(set(equal)) == 1
    assert all(length >= 1 for each in (short, equal, mixed, long) for length in each)
    assert sorted(mixed) != list(mixed) or longest == 16  # neighbours differ, as in a real stream


@given(st.lists(st.integers(1, 300), max_size=20))
def test_a_backend_keeps_what_it_works_on(lengths):
    assert kept_calls(lengths, "grouped") == batched_calls(lengths)
    for name in ("loop", "varlen", "flex", "masked"):
        assert sum(sequences * slots for sequences, slots in kept_calls(lengths, name)) == sum(lengths)
    assert len(kept_calls(lengths, "loop")) == len(lengths)
    assert len(kept_calls(lengths, "varlen")) == bool(lengths)
