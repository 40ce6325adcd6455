"""Mesh x template x alignment x backbone x dtype x dropout: tasks of a run get what they get alone with peft.

Continuous integration plays rows in which every two values meet; ``make parity`` plays the whole product and
prints a table. A solo run knows nothing of mesh, template and alignment, so each serves many rows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.pairwise import covering_rows, pairs_of
from tests.integration.parity import Case

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

MESHES = [mesh for mesh in product((1, 2), repeat=3) if mesh != (2, 2, 2)]
"""``tp``, ``pp``, ``dp``; four ranks at most."""

TEMPLATES = ("flush", "continuous")

ALIGNMENTS: dict[str, dict[str, object]] = {
    "pad": {"alignment": "pad"},
    "pack": {"alignment": "pack"},
    # most sequences take several chunks, in one or two micro-batches
    "chunk": {"alignment": "chunk", "chunk_tokens": 16, "carry": 2},
}

BACKBONES = {
    "llama": Case(  # two query heads on each key/value head
        backbone="llama",
        tasks=("rank1", "rank3", "rank64", "brief"),
        partition="rank1+rank3+rank64,brief",
        policy=None,
    ),
    "gpt2": Case(
        backbone="gpt2",
        tasks=("fused-qkv", "both-proj", "all-gpt2"),
        partition="fused-qkv+both-proj,all-gpt2",
        policy=None,
    ),
    "opt": Case(
        backbone="opt", tasks=("qv-fc1", "rank3", "out-fc2"), partition="qv-fc1+rank3,out-fc2", policy=None
    ),
}

DTYPES = ("float64", "float32", "bfloat16")

DROPOUTS = (None, 0.2)
"""Of all tasks; how tasks with and without it live together is the matter of ``test_dropout.py``."""

DIMENSIONS = (MESHES, TEMPLATES, list(ALIGNMENTS), list(BACKBONES), DTYPES, DROPOUTS)


def case_of(row) -> Case:
    """The case that stands in a row."""
    (tp, pp, dp), template, alignment, backbone, dtype, dropout = row
    return replace(
        BACKBONES[backbone],
        tp=tp,
        pp=pp,
        dp=dp,
        dtype=dtype,
        template=template,
        dropout=dropout,
        **ALIGNMENTS[alignment],
    )


ROWS = covering_rows(DIMENSIONS)

MORE = [
    # both ranks hold the only key/value head
    Case(
        backbone="llama-one-kv-head",
        tasks=("rank1", "rank3", "brief"),
        partition="rank1+rank3,brief",
        policy=None,
        tp=2,
        pp=1,
    ),
]


@pytest.mark.parametrize("case", [*map(case_of, ROWS), *MORE], ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, case):
    bench.assert_same(bench.compare(case), case)


@pytest.mark.parity
@pytest.mark.parametrize("case", [case_of(row) for row in product(*DIMENSIONS)], ids=str)
def test_the_whole_product(bench, case, record_property):
    differences = bench.compare(case)
    shares = [each.share_of(bench.limit(case, task_id)) for task_id, each in differences.items()]
    losses, updates = ([getattr(d, name) for d in differences.values()] for name in ("loss", "update"))
    record_property("parity", [str(case), max(losses), max(updates), max(shares)])
    bench.assert_same(differences, case)


def test_an_adapter_in_bfloat16_would_be_noticed(bench):
    case = replace(BACKBONES["llama"], dtype="bfloat16")
    rounded = bench.bfloat16_error(case, "rank1", float32_adapter=False)
    assert rounded.share_of(bench.limit(case, "rank1")) > 1


def test_every_two_values_meet_in_a_row():
    assert set().union(*map(pairs_of, ROWS)) == set().union(*map(pairs_of, product(*DIMENSIONS)))
    assert len(ROWS) == len(MESHES) * len(BACKBONES), "no fewer can hold all pairs of the two longest"


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_covering_rows_hold_every_pair_and_are_fewer_than_the_product(sizes):
    dimensions = [range(size) for size in sizes]
    rows = covering_rows(dimensions)
    assert set().union(*map(pairs_of, rows)) == set().union(*map(pairs_of, product(*dimensions)))
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(rows) <= 2 * first * second
