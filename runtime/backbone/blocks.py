"""Adapters of tasks that are not at a linear: on a whole block, in front of the keys, on the embedding."""

# T tokens of the stream, t of one task, D hidden size

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from muxtune.batches import Span
from runtime.backbone.spans import aggregating, changed
from runtime.data.batch import MicrobatchTensors
from runtime.peft import TaskAdapter


class SiteAdapters:
    """Adapters of all tasks at one site, in the order in which each task's were attached."""

    def __init__(self) -> None:
        self._adapters: dict[str, list[TaskAdapter]] = {}

    def attach(self, task_id: str, adapter: TaskAdapter) -> None:
        """Give a task an adapter here."""
        self._adapters.setdefault(task_id, []).append(adapter)

    def present(self, batch: MicrobatchTensors) -> list[tuple[Span, TaskAdapter]]:
        """Those of tasks that have tokens in a micro-batch, and which those are."""
        if not self._adapters:
            return []
        return [
            (span, adapter)
            for span, task_id in zip(batch.spans, batch.task_ids, strict=True)
            if span.start < span.stop
            for adapter in self._adapters.get(task_id, ())
        ]

    def aggregate(self, y_TD: Tensor, x_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """A block's output, whole, with what adapters make of it; ``x_TD`` is what its linears read."""
        return changed(
            y_TD,
            [
                (span, None, aggregating(adapter, span, x_TD, batch.dropout_keys_T))
                for span, adapter in self.present(batch)
            ],
        )

    def embed(self, hidden_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """Embedded tokens, with rows of the adapters in the place of virtual ones."""
        return changed(
            hidden_TD,
            [(span, None, _embedding(adapter, span, batch)) for span, adapter in self.present(batch)],
        )

    def keys_values(self, batch: MicrobatchTensors) -> list[Tensor]:
        """Keys and values in front of each task's sequences, of the tasks that have any, in their order."""
        given = [adapter.keys_values() for _, adapter in self.present(batch)]
        return [kv_PF for kv_PF in given if kv_PF is not None]


def _embedding(adapter: TaskAdapter, span: Span, batch: MicrobatchTensors) -> Callable[[Tensor], Tensor]:
    def change(rows_tD: Tensor) -> Tensor:
        return adapter.embed(rows_tD, batch.positions_T[span.start : span.stop])

    return change
