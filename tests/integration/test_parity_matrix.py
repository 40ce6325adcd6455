"""Mesh x template x alignment x backbone x dtype x dropout: tasks of a run get what they get alone.

Alone with peft, or in plain torch if peft does not have the method. Beside LoRA every row has tenants of
some other methods, dealt so that each method meets each value. Continuous integration plays rows in which
every two values meet; ``make parity`` plays the whole product and prints a table. A solo run knows nothing of
mesh, template and alignment, so each serves many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.pairwise import Row, covering_rows, pairs_of
from tests.integration.parity import Case
from tests.integration.parity_tasks import METHODS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

MESHES = [mesh for mesh in product((1, 2), repeat=3) if mesh != (2, 2, 2)]
"""``tp``, ``pp``, ``dp``; four ranks at most."""

TEMPLATES = ("flush", "continuous")

ALIGNMENTS: dict[str, dict[str, object]] = {
    "pad": {"alignment": "pad"},
    "pack": {"alignment": "pack"},
    # most sequences take several chunks, in one or two micro-batches
    "chunk": {"alignment": "chunk", "chunk_tokens": 16, "carry": 2},
}

LORA = {
    "llama": ("rank64", "brief", "rank3"),  # two query heads on each key/value head
    "gpt2": ("fused-qkv", "all-gpt2", "both-proj"),
    "opt": ("qv-fc1", "out-fc2"),
}
"""LoRA tenants of each backbone, which take turns."""

REFUSED = {("llama", "bitfit"), ("gpt2", "shira")}
"""No biases; linears that peft's SHiRA does not take."""

DTYPES = ("float64", "float32", "bfloat16")

DROPOUTS = (None, 0.2)
"""Of LoRA tasks; how tasks with and without it live together is the matter of ``test_dropout.py``."""

DIMENSIONS = (MESHES, TEMPLATES, list(ALIGNMENTS), list(LORA), DTYPES, DROPOUTS)


MIXED = 3
"""Tenants of other methods in a row."""


def values_of(row: Row) -> set[tuple[int, object]]:
    """Values that meet a method in a row; those of a mesh are its three numbers."""
    mesh, *others = row
    return set(enumerate((*mesh, *others)))


def deal(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Methods of each row: those that have met fewest of its values so far."""
    met = {method: set[tuple[int, object]]() for method in METHODS}
    dealt = []
    for row in rows:
        values = values_of(row)
        able = [method for method in met if (row[3], method) not in REFUSED]
        # of equals the one whose last turn is longest ago
        chosen = sorted(able, key=lambda method: len(values & met[method]))[:MIXED]
        for method in chosen:
            met[method] |= values
            met[method] = met.pop(method)
        dealt.append(tuple(chosen))
    return dealt


def case_of(row: Row, lora: str, methods: Sequence[str]) -> Case:
    """The case that stands in a row, with a LoRA tenant and those of other methods."""
    (tp, pp, dp), template, alignment, backbone, dtype, dropout = row
    *fused, last = (lora, *(f"{method}-{backbone}" for method in methods))
    return Case(
        backbone=backbone,
        tasks=(*fused, last),
        partition=f"{'+'.join(fused)},{last}",
        policy=None,
        tp=tp,
        pp=pp,
        dp=dp,
        dtype=dtype,
        template=template,
        dropout=dropout,
        **ALIGNMENTS[alignment],
    )


def cases_of(rows: Sequence[Row]) -> list[Case]:
    """A case for each row."""
    turns = {backbone: cycle(tasks) for backbone, tasks in LORA.items()}
    return [case_of(row, next(turns[row[3]]), methods) for row, methods in zip(rows, deal(rows), strict=True)]


ROWS = covering_rows(DIMENSIONS)

RANKS = ("rank1", "rank3", "rank8", "rank64")

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
    *(
        Case(
            backbone="llama-biases",
            tasks=(*RANKS, *(f"{method}-llama" for method in METHODS)),
            partition="+".join((*RANKS, *(f"{method}-llama" for method in METHODS))),
            policy=None,
            **how,
        )
        for how in (
            {"tp": 2, "pp": 1, **ALIGNMENTS["chunk"]},
            {"dp": 2, "pp": 1, "template": "flush", "alignment": "pad"},
        )
    ),
]
"""What the rows do not have; last, all methods and ranks in one hTask."""


@pytest.mark.parametrize("case", [*cases_of(ROWS), *MORE], ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, case):
    bench.assert_same(bench.compare(case), case)


@pytest.mark.parity
@pytest.mark.parametrize("case", cases_of(list(product(*DIMENSIONS))), ids=str)
def test_the_whole_product(bench, case, record_property):
    differences = bench.compare(case)
    shares = [each.share_of(bench.limit(case, task_id)) for task_id, each in differences.items()]
    losses, updates = ([getattr(d, name) for d in differences.values()] for name in ("loss", "update"))
    record_property("parity", [str(case), max(losses), max(updates), max(shares)])
    bench.assert_same(differences, case)


def test_an_adapter_in_bfloat16_would_be_noticed(bench):
    case = Case(backbone="llama", tasks=("rank1",), dtype="bfloat16")
    rounded = bench.bfloat16_error(case, "rank1", float32_adapter=False)
    assert rounded.share_of(bench.limit(case, "rank1")) > 1


def test_every_two_values_meet_in_a_row():
    assert set().union(*map(pairs_of, ROWS)) == set().union(*map(pairs_of, product(*DIMENSIONS)))
    assert len(ROWS) == len(MESHES) * len(LORA), "no fewer can hold all pairs of the two longest"


def test_every_method_meets_every_value():
    met = {method: set() for method in METHODS}
    for row, methods in zip(ROWS, deal(ROWS), strict=True):
        for method in methods:
            met[method] |= values_of(row)
    everything = set().union(*map(values_of, product(*DIMENSIONS)))
    for method, values in met.items():
        refused = {backbone for backbone, name in REFUSED if name == method}
        assert values == {(place, value) for place, value in everything if value not in refused}, method


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_covering_rows_hold_every_pair_and_are_fewer_than_the_product(sizes):
    dimensions = [range(size) for size in sizes]
    rows = covering_rows(dimensions)
    assert set().union(*map(pairs_of, rows)) == set().union(*map(pairs_of, product(*dimensions)))
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(rows) <= 2 * first * second
