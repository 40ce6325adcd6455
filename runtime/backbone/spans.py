"""Changes of some tasks' rows of a stream, out of place and in plain autograd."""

# T tokens of the stream, t of one task, O features

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from muxtune.batches import Span
from runtime.peft import TaskAdapter

Change = tuple[Span, tuple[int, int] | None, Callable[[Tensor], Tensor]]
"""Rows, columns (None for all), and what stands in their place."""


def changed(y_TO: Tensor, changes: Sequence[Change]) -> Tensor:
    """The tensor with some parts changed, in turn where they are the same; itself if there are none."""
    by_rows: dict[tuple[int, int], list[Change]] = {}
    for change in changes:
        by_rows.setdefault((change[0].start, change[0].stop), []).append(change)
    if not by_rows:
        return y_TO
    pieces: list[Tensor] = []
    end = 0
    sizes: list[int] = []
    owners: list[list[Change]] = []
    for (start, stop), own in sorted(by_rows.items()):
        if start > end:
            sizes.append(start - end)
            owners.append([])
        sizes.append(stop - start)
        owners.append(own)
        end = stop
    if end < len(y_TO):
        sizes.append(len(y_TO) - end)
        owners.append([])
    for piece, own in zip(y_TO.split(sizes), owners, strict=True):  # one gradient for all of them
        for _, columns, make in own:
            piece = make(piece) if columns is None else _in_columns(piece, *columns, make)  # noqa: PLW2901
        pieces.append(piece)
    return torch.cat(pieces)


def _in_columns(y_tO: Tensor, first: int, last: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    before, own, behind = y_tO.split([first, last - first, y_tO.shape[1] - last], dim=1)
    return torch.cat([before, change(own), behind], dim=1)


def updating(
    adapter: TaskAdapter, span: Span, x_TI: Tensor, keys_T: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What adds an adapter's update to a task's rows."""

    def change(y_tO: Tensor) -> Tensor:
        return y_tO + adapter.update(_rows(x_TI, span), _rows(keys_T, span)).to(y_tO.dtype)

    return change


def aggregating(
    adapter: TaskAdapter, span: Span, x_TI: Tensor, keys_T: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What puts an adapter's result in the place of a task's rows."""

    def change(y_tO: Tensor) -> Tensor:
        return adapter.aggregate(y_tO, _rows(x_TI, span), _rows(keys_T, span)).to(y_tO.dtype)

    return change


_Rows = TypeVar("_Rows", Tensor, Tensor | None)


def _rows(x_T: _Rows, span: Span) -> _Rows:
    return None if x_T is None else x_T[span.start : span.stop]
