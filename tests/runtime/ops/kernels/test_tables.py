"""Tables of the grouped kernels: every element of a result has exactly one program."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.ops.kernels.tables import TILE_RANK, TILE_TOKENS, build_layout, build_pointers

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    """Spans with gaps between them, some with several pieces; ranks; width of the input."""
    columns = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    ends = [sum(columns[: i + 1]) for i in range(len(columns))]
    pieces, start = [], 0
    for length, gap in draw(
        st.lists(st.tuples(st.integers(1, 200), st.integers(0, 9)), min_size=1, max_size=5)
    ):
        chosen = draw(st.lists(st.sampled_from(range(len(columns))), min_size=1, max_size=4))
        pieces += [(start, start + length, ends[i] - columns[i], ends[i], 0.5) for i in chosen]
        start += length + gap
    ranks = draw(st.lists(st.integers(1, 70), min_size=len(pieces), max_size=len(pieces)))
    return tuple(pieces), tuple(ranks), draw(st.integers(1, 90))


@given(layouts())
def test_tiles_cover_what_a_piece_computes_once(case):
    pieces, ranks, in_features = case
    layout = build_layout(pieces, ranks, in_features, CPU)
    downs = Counter(
        (piece, token, rank)
        for piece, first_token, first_rank in layout.tiles.tolist()
        for token in range(first_token, min(first_token + TILE_TOKENS, pieces[piece][1]))
        for rank in range(first_rank, min(first_rank + TILE_RANK, ranks[piece]))
    )
    expected = {
        (i, token, rank)
        for i, ((start, stop, *_), rank_) in enumerate(zip(pieces, ranks, strict=True))
        for token in range(start, stop)
        for rank in range(rank_)
    }
    assert set(downs) == expected
    assert set(downs.values()) == {1}
    assert layout.downs == len(expected)
    assert layout.ranks.tolist() == [
        [i, first] for i, rank in enumerate(ranks) for first in range(0, rank, TILE_RANK)
    ]


@given(layouts())
def test_each_token_and_column_is_summed_by_one_program_over_all_its_pieces(case):
    pieces, ranks, in_features = case
    layout = build_layout(pieces, ranks, in_features, CPU)
    for side, columns_of in (
        (layout.inputs, lambda piece: (0, in_features)),
        (layout.outputs, lambda piece: piece[2:4]),
    ):
        rows = side.pieces.tolist()
        summed: dict[tuple[int, int, int], list[int]] = {}
        for token, begin, end in side.sums.tolist():
            adding = side.members[begin:end].tolist()
            start, stop, first, last = rows[adding[0]][:4]
            for each in range(token, min(token + TILE_TOKENS, stop)):
                assert start <= each
                assert (each, first, last) not in summed  # one program
                summed[each, first, last] = sorted(adding)
        expected: dict[tuple[int, int, int], list[int]] = {}
        for i, piece in enumerate(pieces):
            for token in range(*piece[:2]):
                expected.setdefault((token, *columns_of(piece)), []).append(i)
        assert summed == expected
        # Packed parts follow one another, and alignment is promised only where it holds.
        ends = [row[6] + row[4] * (row[3] - row[2]) for row in rows]
        assert [row[6] for row in rows] == [0, *ends[:-1]]
        assert side.weights == ends[-1]
        assert side.aligned == all(row[2] % 16 == row[3] % 16 == 0 for row in rows)


@pytest.mark.parametrize(
    ("second", "spot"),
    [((3, 9, 0, 8), r"\[0, 4\) and \[3, 9\)"), ((0, 4, 4, 12), r"\[0, 8\) and \[4, 12\)")],
)
def test_pieces_that_overlap_in_part_are_refused(second, spot):
    with pytest.raises(ValueError, match=spot):
        build_layout(((0, 4, 0, 8, 1.0), (*second, 1.0)), (2, 2), 16, CPU)


def test_tables_are_built_once():
    arguments = (((0, 4, 0, 8, 1.0),), (2,), 16, CPU)
    assert build_layout(*arguments) is build_layout(*arguments)
    assert build_pointers((1, 2), CPU) is build_pointers((1, 2), CPU)
