"""A frozen linear of the backbone with the adapters of all tasks."""

# T tokens of the stream, t of one task, I features in, O features out

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.peft import Attachment, Step
from runtime.backbone.spans import Change, aggregating, changed, updating
from runtime.data.batch import MicrobatchTensors
from runtime.distributed.sharding import WHOLE, Shard
from runtime.distributed.tensor_parallel import summed
from runtime.peft import RUNTIME_METHODS, Adder, TaskAdapter, frozen_linear


class _Attached(NamedTuple):
    """An adapter of one task at one of the linears."""

    method: str
    step: Step
    columns: tuple[int, int]
    adapter: TaskAdapter


class SharedLinear(nn.Module):
    """Frozen linears that read the same input, as one product, with the adapters of all tasks.

    One product of 512 outputs instead of 256 + 128 + 128 also needs one input gradient and no additions.

    Args:
        weights: ``[O, I]`` of each linear by its path in the layer, in the order of their outputs.
        biases: ``[O]`` of each, or empty if they have none; whole where the outputs are.
        sums: Ranks whose outputs are terms of a sum: of linears that are split by their inputs. The first of
            them adds the bias.
    """

    def __init__(
        self, weights: dict[str, Tensor], biases: Sequence[Tensor] = (), *, sums: Shard = WHOLE
    ) -> None:
        super().__init__()
        # cat copies: a stage must not keep the whole model alive.
        self.weight_OI = nn.Parameter(torch.cat(list(weights.values())), requires_grad=False)
        self.bias_O = nn.Parameter(torch.cat(list(biases)), requires_grad=False) if biases else None
        self.columns: dict[str, tuple[int, int]] = {}
        stop = 0
        for name, weight in weights.items():
            self.columns[name] = (stop, stop + len(weight))
            stop += len(weight)
        self._sums = sums
        self._adds_bias = sums.index == 0
        self._attached: dict[str, list[_Attached]] = {}
        self._steps: set[Step] = set()

    def attach(self, task_id: str, method: str, each: Attachment, adapter: TaskAdapter) -> None:
        """Give a task an adapter on one of the linears."""
        attached = _Attached(method, each.step, self.columns[each.site.path], adapter)
        self._attached.setdefault(task_id, []).append(attached)
        self._steps.add(each.step)

    def part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear at a path of the layer, as views."""
        first, last = self.columns[name]
        return self.weight_OI[first:last], None if self.bias_O is None else self.bias_O[first:last]

    def forward(self, x_TI: Tensor, batch: MicrobatchTensors) -> Tensor:
        """All outputs side by side, ``[T, O]``, summed over the ranks where they are terms of a sum."""
        given_TI, keys_T = x_TI, batch.dropout_keys_T
        rewrites = self._of(batch, Step.REWRITE)
        whole = len(self.columns) == 1
        if rewrites and whole:
            x_TI = changed(x_TI, [(span, None, one.adapter.dispatch) for span, one in rewrites])
        adders, updates = self._added(x_TI, batch)
        y_TO = frozen_linear(x_TI, self.weight_OI, self.bias_O if self._adds_bias else None, adders)
        if rewrites and not whole:
            y_TO = changed(y_TO, [self._computed_again(x_TI, span, one) for span, one in rewrites])
        y_TO = summed(changed(y_TO, updates), self._sums)
        outputs = self._of(batch, Step.OUTPUT)
        return changed(
            y_TO,
            [(span, one.columns, aggregating(one.adapter, span, given_TI, keys_T)) for span, one in outputs],
        )

    def _of(self, batch: MicrobatchTensors, step: Step) -> list[tuple[Span, _Attached]]:
        """Adapters of a step on tokens that are there."""
        if step not in self._steps:
            return []
        return [
            (span, one)
            for span, task_id in zip(batch.spans, batch.task_ids, strict=True)
            if span.start < span.stop  # else no sequence of this task is in this micro-batch
            for one in self._attached.get(task_id, ())
            if one.step == step
        ]

    def _added(self, x_TI: Tensor, batch: MicrobatchTensors) -> tuple[list[Adder], list[Change]]:
        """What adds inside of the product's autograd function, by methods that have such; and the others."""
        keys_T = batch.dropout_keys_T
        adders: list[Adder] = []
        updates: list[Change] = []
        added = sorted(self._of(batch, Step.LINEAR), key=_kind)
        for (method, _), members in groupby(added, key=_kind):
            own = list(members)
            adder = RUNTIME_METHODS.get(method).adder([(span, one.adapter) for span, one in own], keys_T)
            if adder is not None:
                adders.append(adder)
                continue
            updates += [(span, one.columns, updating(one.adapter, span, x_TI, keys_T)) for span, one in own]
        return adders, updates

    def _computed_again(self, x_TI: Tensor, span: Span, one: _Attached) -> Change:
        """Outputs of one of several linears for a task that rewrites what this one reads alone."""
        first, last = one.columns
        weight_OI = self.weight_OI[first:last]
        bias_O = None if self.bias_O is None or not self._adds_bias else self.bias_O[first:last]

        def again(y_tO: Tensor) -> Tensor:
            x_tI = one.adapter.dispatch(x_TI[span.start : span.stop])
            return frozen_linear(x_tI, weight_OI, bias_O, static_shape=False)

        return span, one.columns, again


def _kind(pair: tuple[Span, _Attached]) -> tuple[str, str]:
    """What may share an adder: adapters of one method and class."""
    return pair[1].method, type(pair[1].adapter).__name__
