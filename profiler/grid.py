"""Shapes that are measured: close together where micro-batches usually lie, 50 to 1500 tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from itertools import product

from muxtune.batches import ROW_MULTIPLE, row_slots
from muxtune.costs.compose import frozen_products
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.model import ModelSpec
from muxtune.operators import COLLECTIVE_KINDS, KINDS, Operator
from muxtune.peft import all_kinds

MAX_TOKENS = 4096
"""Tokens of the largest micro-batch that is measured; larger ones are priced as at this edge."""


_LOSS_BYTES = (64, 512)


def operator_grid(
    model: ModelSpec, *, quick: bool, kinds: Set[str] = PLAIN_KINDS, group_sizes: Sequence[int] = (2,)
) -> list[Operator]:
    """Every operator to measure, transfers and collectives included.

    Args:
        model: Backbone whose shapes are measured.
        quick: Fewer points, for a first look.
        kinds: Kinds to measure.
        group_sizes: Numbers of ranks of the collectives.
    """
    products = sorted(set(frozen_products(model)))
    linear_tokens = powers(16, MAX_TOKENS, 4) if quick else powers_and_between(16, MAX_TOKENS)
    tokens = powers(16, MAX_TOKENS, 4 if quick else 2)
    grid = [Operator("linear", (i, o, n)) for (i, o), n in product(products, linear_tokens)]
    grid += _adapters(model, quick=quick)
    grid += _attention(model, quick=quick)
    grid += [Operator(kind, (n,)) for kind, n in product(("norm", "activation"), tokens)]
    grid += [Operator("embedding", (n,)) for n in powers(16, MAX_TOKENS, 4)]
    grid += [Operator("head", (n,)) for n in powers(1, 1024, 8 if quick else 4)]
    grid += _optimizer(model, quick=quick)
    grid += [Operator("feed", (n,)) for n in powers(1, 64, 8 if quick else 4)]
    # One measurement gives both: the time until a message is there, and what it takes from the processor.
    transfers = powers(4 << 10, 8 << 20, 8 if quick else 2)
    grid += [Operator(kind, (n,)) for kind, n in product(("p2p", "message"), transfers)]
    sizes_bytes = powers(4 << 10, 8 << 20, 64 if quick else 8)
    grid += [
        Operator(kind, dims)
        for kind in sorted(COLLECTIVE_KINDS)
        for dims in product(sizes_bytes, group_sizes)
    ]
    # The losses of a micro-batch over a split vocabulary are a few numbers for each target.
    grid += [Operator("all_reduce", dims) for dims in product(_LOSS_BYTES, group_sizes)]
    grid += _stages(model, quick=quick)
    return [op for op in grid if op.kind in kinds]


def _adapters(model: ModelSpec, *, quick: bool) -> Iterator[Operator]:
    """What PEFT methods run, at the shapes that they say."""
    all_kinds()  # loads the methods of other packages
    for name, kind in KINDS.items():
        if kind.grid is not None:
            yield from (Operator(name, dims) for dims in kind.grid(model, quick))


def powers(low: int, high: int, factor: int) -> list[int]:
    """``low``, ``factor * low``, ... and ``high``."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= factor
    return [*sizes, high]


def powers_and_between(low: int, high: int) -> list[int]:
    """Powers of two with 1.5 times each of them."""
    doubled = powers(low, high, 2)
    return sorted({*doubled, *(size * 3 // 2 for size in doubled[:-1])})


def _attention(model: ModelSpec, *, quick: bool) -> Iterator[Operator]:
    """(sequences, length) up to a number of tokens; every length with the most sequences that fit."""
    longest = min(1024, model.max_positions)
    lengths = powers(ROW_MULTIPLE, longest, 4) if quick else powers_and_between(ROW_MULTIPLE, longest)
    for length in sorted({row_slots(length) for length in lengths}):
        most = min(64, max(1, MAX_TOKENS // length))
        for sequences in sorted({n for n in (1, 4, 16) if n < most} | {most}):
            yield Operator("attention", (sequences, length))


def _optimizer(model: ModelSpec, *, quick: bool) -> Iterator[Operator]:
    """Steps from one target on one layer to all linears on all layers; ranks from 1 to 64."""
    most = 2 * len(model.linears) * model.layers
    for tensors in powers(2, most, 8 if quick else 4):
        for elements in powers(model.hidden, 64 * model.hidden, 64 if quick else 8):
            yield Operator("optimizer", (tensors, tensors * elements))


def _stages(model: ModelSpec, *, quick: bool) -> Iterator[Operator]:
    """Whole micro-batches, small and large, with one task and with several: what fits in few seconds."""
    cases = _QUICK_STAGES if quick else _STAGES
    narrowest = min(min(linear.in_features, linear.out_features) for linear in model.linears)
    seen = set()
    for layers, tasks, r, sequences, length in cases:
        dims = (
            *(min(layers, model.layers), tasks, min(r, narrowest), sequences),
            min(length, model.max_positions),
        )
        if dims not in seen:
            seen.add(dims)
            yield Operator("stage", dims)


_QUICK_STAGES = (
    *((1, 1, 8, 1, 16), (1, 4, 8, 4, 64), (3, 2, 8, 2, 32), (3, 4, 16, 4, 32)),
    *((1, 1, 0, 2, 32), (1, 4, 0, 4, 64), (3, 1, 0, 2, 128)),
)
"""(layers, tasks, r, sequences, length). Without adapters (r = 0) the frozen operators show by themselves."""

_STAGES = (
    *((1, 1, 8, 1, 16), (1, 1, 8, 2, 32), (1, 1, 16, 4, 128), (1, 4, 8, 4, 64), (1, 8, 8, 2, 64)),
    *((3, 1, 8, 2, 64), (3, 1, 8, 8, 32), (3, 2, 64, 4, 128), (3, 4, 8, 4, 32)),
    *((3, 4, 16, 4, 64), (3, 8, 4, 2, 48), (4, 1, 8, 8, 192), (4, 4, 16, 4, 128)),
    *((1, 1, 0, 2, 32), (3, 1, 0, 8, 32), (3, 1, 0, 2, 256), (3, 4, 0, 4, 64), (4, 1, 0, 8, 192)),
    *((1, 1, 0, 16, 16), (4, 4, 0, 4, 128)),
)
