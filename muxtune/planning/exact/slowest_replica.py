"""The replica that decides: all wait for the slowest one where they sum their gradients.

Replicas play one schedule on micro-batches of equal streams, but their sequences differ, and with them
attention, adapters and the head; some have nothing to do. So a stage's micro-batch is priced as the mean one
of the replica that is busy there longest, step by step. With several hTasks it need not be the same replica
in all of them: replicas meet at every hTask's optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.costs.base import CostModel
from muxtune.costs.compose import ActionPrices
from muxtune.graph import Launching
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.operators import PHASES, Operator
from muxtune.model import ModelSpec
from muxtune.planning.exact.works import Choice, HTaskWorks


def slowest_replicas(
    works: HTaskWorks,
    costs: CostModel,
    model: ModelSpec,
    layers: int,
    *,
    first: bool,
    last: bool,
    tp: int = 1,
    adapters: Launching = "grouped",
) -> Choice:
    """Replica whose micro-batches keep a stage busy longest, in every sampled step.

    Args:
        works: Work of the hTask.
        costs: Costs of operators, for the whole backbone.
        model: The backbone, whole.
        layers: Layers of the stage.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        tp: Tensor-parallel ranks.
        adapters: How those of several tasks at one base op are launched.
    """

    def busy_s(work: MicrobatchWork) -> float:
        prices = (ActionPrices(costs, model, work, phase, tp=tp, adapters=adapters) for phase in PHASES)
        return sum(each.seconds(layers, first=first, last=last) for each in prices)

    chosen = []
    for row in works.steps:
        if len(row) == 1:
            chosen.append(0)
            continue
        replicas = _front([each.mean for each in row], costs if tp == 1 else costs.shard(tp))
        if len(replicas) > 1:  # pricing them is what takes the time
            replicas.sort(key=lambda replica: -busy_s(row[replica].mean))
        chosen.append(replicas[0])
    return tuple(chosen)


def _front(works: Sequence[MicrobatchWork], prices: CostModel) -> list[int]:
    """Replicas that no other one has as much work as in every respect; of equal ones the first."""
    measures = [
        (_attention_s(work, prices), work.targets, work.sequences, *work.task_tokens) for work in works
    ]
    found: list[int] = []
    for replica in sorted(range(len(works)), key=lambda i: measures[i], reverse=True):  # stable
        own = measures[replica]
        if not any(all(a >= b for a, b in zip(measures[i], own, strict=True)) for i in found):
            found.append(replica)
    return found


def _attention_s(work: MicrobatchWork, prices: CostModel) -> float:
    """Seconds of attention in a layer, forward and backward."""
    calls = [(n, Operator("attention", (sequences, length))) for n, sequences, length in work.attention]
    calls += [
        (n, Operator("carried_attention", (sequences, queries, keys)))
        for n, sequences, queries, keys in work.carried_attention
    ]
    return sum(n * prices.latency_s(op, phase) for n, op in calls for phase in PHASES)
