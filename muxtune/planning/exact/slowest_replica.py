"""The replica that decides: all wait for the slowest one where they sum their gradients.

Replicas play one schedule on micro-batches of equal streams, but their sequences differ, and with them
attention, adapters and the head; some have nothing to do. So a stage's micro-batch is priced as the mean one
of the replica that is busy there longest, step by step. With several hTasks it need not be the same replica
in all of them: replicas meet at every hTask's optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from muxtune.costs.base import CostModel
from muxtune.costs.compose import ActionPrices, StreamSeconds
from muxtune.graph import Launching
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.model import ModelSpec
from muxtune.operators import PHASES, Phase, operator
from muxtune.peft import Layers, PeftSpec
from muxtune.planning.exact.works import Choice, HTaskWorks


class SlowestReplicas:
    """Replicas of an hTask that keep stages busy longest; their parts are priced once for all stages.

    Args:
        works: Work of the hTask.
        costs: Costs of operators, for the whole backbone.
        model: The backbone, whole.
        tp: Tensor-parallel ranks.
        adapters: How those of several tasks at one base op are launched.
        streams: What is known of streams of some length, see :class:`muxtune.costs.compose.ActionPrices`.
    """

    def __init__(
        self,
        works: HTaskWorks,
        costs: CostModel,
        model: ModelSpec,
        *,
        tp: int = 1,
        adapters: Launching = "grouped",
        streams: StreamSeconds | None = None,
    ) -> None:
        self._works = works
        self._costs = costs
        self._model = model
        self._tp = tp
        self._adapters = adapters
        self._streams = {} if streams is None else streams
        self._replicas = lru_cache(maxsize=None)(self._find_front)
        self._prices = lru_cache(maxsize=None)(self._price)

    def on_stage(self, layers: Layers, *, first: bool, last: bool) -> Choice:
        """Replica whose micro-batches keep a stage busy longest, in every sampled step.

        Args:
            layers: Layers of the stage.
            first: Whether the stage begins with the embedding.
            last: Whether it ends with the head.
        """

        def busy_s(step: int, replica: int) -> float:
            prices = (self._prices(step, replica, phase) for phase in PHASES)
            return sum(each.seconds(layers, first=first, last=last) for each in prices)

        chosen = []
        for step in range(len(self._works.steps)):
            replicas = self._replicas(step, last)
            slowest = replicas[0]
            if len(replicas) > 1:  # pricing them is what takes the time
                slowest = max(replicas, key=lambda replica: busy_s(step, replica))
            chosen.append(slowest)
        return tuple(chosen)

    def _find_front(self, step: int, last: bool) -> list[int]:
        """Replicas that may be the slowest; only the last stage computes targets."""
        row = self._works.steps[step]
        if len(row) == 1:
            return [0]
        prices = self._costs if self._tp == 1 else self._costs.shard(self._tp)
        alike: dict[PeftSpec, list[int]] = {}  # tasks whose adapters cost the same
        for task, peft in enumerate(row[0].pefts):
            alike.setdefault(peft, []).append(task)
        measures = []
        for each in row:
            work = each.mean
            targets = work.targets if last else 0.0
            tokens = (sorted([work.task_tokens[task] for task in tasks]) for tasks in alike.values())
            measures.append(
                (_attention_s(work, prices), targets, work.sequences, *chain.from_iterable(tokens))
            )
        return _front(measures)

    def _price(self, step: int, replica: int, phase: Phase) -> ActionPrices:
        work = self._works.steps[step][replica].mean
        return ActionPrices(
            self._costs,
            self._model,
            work,
            phase,
            tp=self._tp,
            adapters=self._adapters,
            streams=self._streams,
        )


def _front(measures: Sequence[tuple[float, ...]]) -> list[int]:
    """Positions of what no other one has as much as in every respect; of equal ones the first."""
    found: list[int] = []
    for position in sorted(range(len(measures)), key=lambda i: measures[i], reverse=True):  # stable
        own = measures[position]
        if not any(all(a >= b for a, b in zip(measures[i], own, strict=True)) for i in found):
            found.append(position)
    return found


def _attention_s(work: MicrobatchWork, prices: CostModel) -> float:
    """Seconds of attention in a layer, forward and backward."""
    calls = [(n, operator("attention", sequences, length)) for n, sequences, length in work.attention]
    calls += [(n, operator("carried_attention", *shape)) for n, *shape in work.carried_attention]
    return sum(n * prices.latency_s(op, phase) for n, op in calls for phase in PHASES)
