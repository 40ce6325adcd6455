"""Keys and values that a micro-batch leaves to later ones of its carry group, and their gradients.

The parts of a sequence may lie in several micro-batches, which have a graph each. In every layer, those
behind read keys and values of those before: a leaf that is cut off from the earlier graph. Micro-batches go
back in reverse order, so when an earlier one's turn comes, the leaf's gradient is whole: all that read it
have added to it. It then enters the earlier graph as one more gradient of the keys and values there.

Keys and values that a task has in front of its sequences (:class:`muxtune.peft.Extra`) are read in the same
way, as if an earlier micro-batch had left them; each of the task's sequences reads the same ones.
"""

# M tokens that are left, F = 2 K D features of k|v

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, autograd

from muxtune.batches import MicrobatchLayout, Row, sequence_rows
from runtime.ops.autograd import Context


class CarriedKv:
    """What the micro-batches of a carry group have left so far, layer by layer. Lives as long as they do."""

    def __init__(self) -> None:
        self._left: defaultdict[object, list[Tensor]] = defaultdict(list)

    def leave(self, layer: object, kv_MF: Tensor, output: Tensor) -> Tensor:
        """Leave keys and values of a layer to later micro-batches.

        Args:
            layer: Layer that they belong to.
            kv_MF: Keys and values, rotated, after those that earlier micro-batches have left.
            output: Output of the attention that computed them; its backward collects their gradients.

        Returns:
            ``output``; only through this tensor do the gradients arrive.
        """
        leaf_MF = kv_MF.detach().requires_grad_(kv_MF.requires_grad)
        self._left[layer].append(leaf_MF)
        joined: Tensor = _Collect.apply(output, kv_MF, leaf_MF)
        return joined

    def left(self, layer: object) -> Sequence[Tensor]:
        """What earlier micro-batches have left, in their order; each ``[M, F]``."""
        return self._left[layer]

    def follow(self, note: Callable[[Tensor], None]) -> None:
        """Have a function told each tensor that has been left so far, whenever a gradient has come to it."""
        for leaf_MF in chain.from_iterable(self._left.values()):
            if leaf_MF.requires_grad:
                leaf_MF.register_post_accumulate_grad_hook(note)


class _Collect(autograd.Function):
    """Passes ``output`` on; backward, the gradient that later micro-batches gave to the leaf is added."""

    @staticmethod
    def forward(ctx: Context, output: Tensor, kv_MF: Tensor, leaf_MF: Tensor) -> Tensor:
        ctx.leaf = leaf_MF
        ctx.save_for_backward(kv_MF)  # the leaf's storage: it counts as kept from here to the backward
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grad, ctx.leaf.grad, None


class CarriedPlaces:
    """Where the keys from elsewhere lie: those in front of tasks' sequences, then those that were left.

    Args:
        earlier: Layouts of the carry group's micro-batches before this one.
        fronts: By task, how many keys stand in front of each of its sequences, in the order of the tasks.
    """

    def __init__(self, earlier: Iterable[MicrobatchLayout], fronts: Mapping[int, int] | None = None) -> None:
        self.tokens = 0
        """Tokens that these are."""
        self._fronts: dict[int, NDArray[np.int64]] = {}
        for task, keys in (fronts or {}).items():
            self._fronts[task] = np.arange(self.tokens, self.tokens + keys)
            self.tokens += keys
        self.in_front = self.tokens
        """Keys in front of sequences, of all tasks."""
        self._places: defaultdict[tuple[int, int], list[NDArray[np.int64]]] = defaultdict(list)
        for layout in earlier:
            for row in leaving_rows(sequence_rows(layout.segments)):
                places = np.arange(self.tokens, self.tokens + row.tokens)
                self._places[row.parts[0].task, row.parts[0].sequence].append(places)
                self.tokens += row.tokens

    def of(self, row: Row) -> NDArray[np.int64]:
        """Places of the keys before a row: those in front, then tokens in the order of the sequence."""
        task, sequence = row.parts[0].task, row.parts[0].sequence
        front = [self._fronts[task]] if row.front else []
        places = np.concatenate([*front, *self._places[task, sequence]])
        assert len(places) == row.carried, "parts stand in the order of their sequence"
        return places


def leaving_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows whose keys and values later micro-batches need, in the order in which they are left."""
    return (row for row in rows if row.after)
