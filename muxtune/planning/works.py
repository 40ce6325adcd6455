"""What the micro-batches of an hTask put through the backbone, sampled from its tasks' data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from muxtune.alignment import HTaskShape, batched_calls, deal_sequences, group_tokens, place_groups
from muxtune.costs.compose import MicrobatchWork
from muxtune.dataset import TaskData
from muxtune.planning.structure import HTaskChoice

SAMPLED_STEPS = 3
"""Steps whose real layouts are looked at; the static part of a micro-batch does not depend on the step."""


@dataclass(frozen=True, slots=True)
class HTaskWorks:
    """Work of an hTask's micro-batches over a few steps, spread over the run of its shortest task."""

    mean: MicrobatchWork
    """For prices."""
    largest: MicrobatchWork
    """For memory: the mean, but with the most slots of attention and the most targets that one has."""


def sample_works(htask: HTaskChoice, data: Mapping[str, TaskData]) -> HTaskWorks:
    """Look at the micro-batches of the sampled steps, as :func:`muxtune.alignment.layout_step` lays them out.

    What matters here is which sequences share a micro-batch, not where they lie in it.

    Args:
        htask: Tasks and alignment.
        data: Per task id.
    """
    members = [data[task_id] for task_id in htask.task_ids]
    shape = htask.shape
    steps = min(each.task.steps for each in members)
    calls: list[list[tuple[int, int]]] = []
    targets: list[int] = []
    task_tokens = np.zeros(len(members), dtype=np.int64)
    for step in {round(i * (steps - 1) / max(SAMPLED_STEPS - 1, 1)) for i in range(SAMPLED_STEPS)}:
        dealt = [_dealt(each, step, shape) for each in members]
        sizes = [np.array([[group.tokens for group in groups]]) for groups in dealt]
        placed = [each[0].tolist() for each in place_groups(sizes, shape.alignment)]
        for microbatch in range(shape.groups):
            groups = [dealt[task][placed[task][microbatch]] for task in range(len(members))]
            calls.append(batched_calls(list(chain.from_iterable(group.rows for group in groups))))
            targets.append(sum(group.targets for group in groups))
        task_tokens += [int(each.sum()) for each in sizes]
    share = 1 / len(calls)
    mean = MicrobatchWork(
        tokens=shape.tokens,
        task_tokens=tuple(round(tokens / len(calls)) for tokens in task_tokens.tolist()),
        loras=tuple(each.task.peft for each in members),
        attention=tuple((n * share, *call) for call, n in sorted(Counter(chain(*calls)).items())),
        targets=sum(targets) * share,
    )
    most_slots = max(calls, key=lambda each: sum(sequences * slots for sequences, slots in each))
    return HTaskWorks(
        mean=mean,
        largest=replace(
            mean, attention=tuple((1.0, *call) for call in most_slots), targets=float(max(targets))
        ),
    )


class _Group(NamedTuple):
    """Sequences of a task that share a micro-batch."""

    rows: list[int]
    """Slots of attention of each."""
    tokens: int
    """Of the stream."""
    targets: int


_KNOWN: WeakKeyDictionary[TaskData, dict[tuple[object, ...], list[_Group]]] = WeakKeyDictionary()
"""A task's groups do not depend on its neighbours, and a search tries many."""


def _dealt(data: TaskData, step: int, shape: HTaskShape) -> list[_Group]:
    known = _KNOWN.setdefault(data, {})
    key = (step, shape.alignment, shape.groups, shape.row_tokens)
    if key not in known:
        known[key] = _deal(data, step, shape)
    return known[key]


def _deal(data: TaskData, step: int, shape: HTaskShape) -> list[_Group]:
    lengths = data.batch_lengths(step)
    targets = data.targets[data.step_indices(step)]
    groups = deal_sequences(lengths, shape.alignment, shape.groups)
    tokens = group_tokens(lengths, groups, shape.alignment, shape.row_tokens)
    padded = shape.row_tokens if shape.alignment == "pad" else None
    return [
        _Group(
            [padded] * len(group) if padded else lengths[group].tolist(), tokens[i], int(targets[group].sum())
        )
        for i, group in enumerate(groups)
    ]
