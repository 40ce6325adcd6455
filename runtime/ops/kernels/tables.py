"""Tables that say which program of a grouped kernel does what; the host builds them once per layout.

A linear reads the stream on its input side (``A``, ``[R, I]``, spans all I columns) and writes it on its
output side (``B``, ``[O, R]``, spans the outputs that its piece adds to). The kernels do not know the sides:
they take the tables of one.
"""

# P pieces, t tokens of one, R its rank

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product

import torch
from torch import Tensor

from runtime.ops.dropout import Dropout

Piece = tuple[int, int, int, int, float]
"""One pair of factors at work: tokens start and stop, columns of the output start and stop, scale."""

TILE_TOKENS = 64

TILE_RANK = 16
"""The least that a matrix unit takes. A piece of a higher rank has several tiles of its own, so that ranks 1
and 64 meet in one launch without one paying for the other."""

_KEPT = 4096
"""Tables that are kept: a few per micro-batch, and the pointers of every linear; some kilobytes each."""


@dataclass(frozen=True, slots=True)
class Side:
    """Tables of the input or output side; integers are int64, on the device."""

    pieces: Tensor
    """``[P, 7]``: tokens start and stop, columns start and stop, rank, offset of its ``[t, R]`` in the packed
    down projections, offset of its weight in packed gradients."""
    sums: Tensor
    """``[n, 3]``: a tile's first token, and the slice of ``members`` that add to it."""
    members: Tensor
    """``[P]``: pieces in the order of what they add to."""
    row_major: bool
    """Whether a weight is ``[R, columns]``, as A is, or ``[columns, R]``, as B is."""
    width: int
    """Columns of the widest piece."""
    aligned: bool
    """Whether all columns begin and end at multiples of 16."""
    weights: int
    """Elements of all weights."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Tables of all pieces on one linear."""

    inputs: Side
    outputs: Side
    scales: Tensor
    """``[P]``, float32."""
    tiles: Tensor
    """``[n, 3]``: piece, first token and first rank of every tile of the down projections."""
    ranks: Tensor
    """``[n, 2]``: piece and first rank of every tile of the weights."""
    downs: int
    """Elements of all down projections."""


@lru_cache(maxsize=_KEPT)
def build_layout(
    pieces: tuple[Piece, ...], ranks: tuple[int, ...], in_features: int, device: torch.device
) -> Layout:
    """Tables for pieces that are not empty.

    Args:
        pieces: Tokens and outputs of each; those of two may be the same or disjoint.
        ranks: Rank of each piece.
        in_features: Columns of the input.
        device: Device of the tables.

    Raises:
        ValueError: Two pieces overlap in part, so programs would write the same element at once.
    """
    shapes = list(zip(pieces, ranks, strict=True))
    downs = _offsets((stop - start) * rank for (start, stop, *_), rank in shapes)
    inputs = _offsets(rank * in_features for rank in ranks)
    outputs = _offsets(rank * (last - first) for (_, _, first, last, _), rank in shapes)
    input_rows, output_rows = [], []
    for i, ((start, stop, first, last, _), rank) in enumerate(shapes):
        input_rows.append((start, stop, 0, in_features, rank, downs[i], inputs[i]))
        output_rows.append((start, stop, first, last, rank, downs[i], outputs[i]))
    # Programs that read the same tokens are neighbours, so all but the first find them in the L2 cache.
    tiles = sorted(
        (token, i, rank0)
        for i, ((start, stop, *_), rank) in enumerate(shapes)
        for token, rank0 in product(range(start, stop, TILE_TOKENS), range(0, rank, TILE_RANK))
    )
    return Layout(
        inputs=_build_side(input_rows, inputs[-1], device, row_major=True),
        outputs=_build_side(output_rows, outputs[-1], device, row_major=False),
        scales=_upload([scale for *_, scale in pieces], torch.float32, device),
        tiles=_upload([(i, token, rank0) for token, i, rank0 in tiles], torch.int64, device),
        ranks=_upload(
            [(i, rank0) for i, rank in enumerate(ranks) for rank0 in range(0, rank, TILE_RANK)],
            torch.int64,
            device,
        ),
        downs=downs[-1],
    )


@lru_cache(maxsize=_KEPT)
def build_pointers(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as a table on the device; those of parameters stay the same for a whole run."""
    return _upload(addresses, torch.int64, device)


@lru_cache(maxsize=_KEPT)
def build_drops(dropouts: tuple[Dropout | None, ...], device: torch.device) -> Tensor:
    """Dropout of each piece, ``[P, 3]``: growth of a token's state, threshold, first feature; or zeros."""
    rows = [
        (0, 0, 0) if each is None else (each.growth, each.threshold, each.first_feature) for each in dropouts
    ]
    return _upload(rows, torch.int64, device)


def _offsets(sizes: Iterable[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _build_side(
    rows: Sequence[tuple[int, ...]], weights: int, device: torch.device, *, row_major: bool
) -> Side:
    targets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        targets[row[:4]].append(i)
    _check_disjoint(targets)
    sums: list[tuple[int, int, int]] = []
    members: list[int] = []
    for (start, stop, _, _), adding in sorted(targets.items()):
        begin = len(members)
        members += adding
        sums += [(token, begin, len(members)) for token in range(start, stop, TILE_TOKENS)]
    return Side(
        pieces=_upload(rows, torch.int64, device),
        sums=_upload(sums, torch.int64, device),
        members=_upload(members, torch.int64, device),
        row_major=row_major,
        width=max(last - first for _, _, first, last, *_ in rows),
        aligned=all(first % 16 == last % 16 == 0 for _, _, first, last, *_ in rows),
        weights=weights,
    )


def _check_disjoint(targets: Iterable[tuple[int, ...]]) -> None:
    columns: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for start, stop, first, last in targets:
        columns[start, stop].append((first, last))
    for ranges in (list(columns), *columns.values()):
        for (start, stop), (next_start, next_stop) in pairwise(sorted(ranges)):
            if next_start < stop:
                raise ValueError(
                    f"[{start}, {stop}) and [{next_start}, {next_stop}) of a linear overlap: expected the "
                    "same or disjoint tokens, and of these the same or disjoint outputs"
                )


def _upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return table.to(device)
    # From pageable memory the copy would wait for everything that the GPU has still to do.
    return table.pin_memory().to(device, non_blocking=True)
