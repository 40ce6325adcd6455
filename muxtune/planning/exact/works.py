"""What the micro-batches of an hTask put through the backbone, sampled from its tasks' data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from muxtune.batches import (
    HTaskShape,
    batched_calls,
    batched_carried_calls,
    deal_sequences,
    group_tokens,
    place_groups,
)
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName, kept_calls
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.memory.saved_activations import attention_rows, gathered_keys
from muxtune.peft import Specs, extra
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.exact.carried_works import carry_groups
from muxtune.planning.exact.work_sums import WorkSum
from muxtune.tasks import TaskData

SAMPLED_STEPS = 3
"""Steps whose real layouts are looked at; the static part of a micro-batch does not depend on the step."""


Choice = tuple[int, ...]
"""A replica for every sampled step."""


@dataclass(frozen=True)
class HTaskWorks:
    """Work of an hTask's micro-batches over a few steps, spread over the run of its shortest task."""

    steps: tuple[tuple[WorkSum, ...], ...]
    """``[step][replica]``: micro-batches of a replica in a sampled step, added up."""
    fullest: tuple[MicrobatchWork, ...]
    """Micro-batch that memory is computed for: the mean, but with the most slots of attention and the most
    targets that one has. Where micro-batches form carry groups, those of the fullest group, in order, with
    the most targets that one of their place in a group has."""

    @property
    def pefts(self) -> Specs:
        """Methods of the hTask's tasks."""
        return self.steps[0][0].pefts

    @cached_property
    def mean(self) -> MicrobatchWork:
        """Average micro-batch of all replicas. No replica need have such ones; prices are for :meth:`of`."""
        return WorkSum.of_all(chain.from_iterable(self.steps)).mean

    def of(self, choice: Choice) -> MicrobatchWork:
        """Average micro-batch of one replica in each sampled step."""
        return WorkSum.of_all(row[replica] for row, replica in zip(self.steps, choice, strict=True)).mean


def sample_works(
    htask: HTaskChoice, data: Mapping[str, TaskData], *, attention: AttentionName = DEFAULT_ATTENTION
) -> HTaskWorks:
    """Look at the micro-batches of the sampled steps.

    What matters here is which sequences share a micro-batch, not where
    :func:`muxtune.batches.layout_step` puts them in it.

    Args:
        htask: Tasks and alignment.
        data: Data of each task, by task id.
        attention: Backend whose slots count for memory; carry groups count as under the default. Prices are
            for calls of near-equal sequences under each, as a profile has them.
    """
    members = [data[task_id] for task_id in htask.task_ids]
    shape = htask.shape
    if shape.carry > 1:
        return _sample_carry_groups(members, shape)
    pefts = tuple(each.task.peft for each in members)
    fronts = [extra(peft).keys for peft in pefts]
    rows: list[list[int]] = []
    works: list[MicrobatchWork] = []
    for step in _sampled_steps(members):
        dealt = [_dealt(each, step, shape) for each in members]
        sizes = [np.array([[group.tokens for group in groups]]) for groups in dealt]
        placed = [each[0].tolist() for each in place_groups(sizes, shape.alignment)]
        for microbatch in range(shape.groups):
            groups = [dealt[task][placed[task][microbatch]] for task in range(len(members))]
            alone = (group.rows for group, keys in zip(groups, fronts, strict=True) if not keys)
            rows.append(list(chain.from_iterable(alone)))
            behind = [
                (row, row + keys)
                for group, keys in zip(groups, fronts, strict=True)
                if keys
                for row in group.rows
            ]
            works.append(
                MicrobatchWork(
                    tokens=shape.tokens,
                    task_tokens=tuple(group.tokens for group in groups),
                    pefts=pefts,
                    attention=tuple((1.0, *call) for call in batched_calls(rows[-1])),
                    targets=float(sum(group.targets for group in groups)),
                    carried_attention=tuple((1.0, *call) for call in batched_carried_calls(behind)),
                )
            )
    steps = _by_step_and_replica(works, shape)
    mean = HTaskWorks(steps, ()).mean
    if attention == DEFAULT_ATTENTION:
        calls = [[call[1:] for call in work.attention] for work in works]
    else:
        calls = [kept_calls(each, attention) for each in rows]
    slots = [
        sum(n * each for n, each in own) + attention_rows(replace(work, attention=())) + gathered_keys(work)
        for own, work in zip(calls, works, strict=True)
    ]
    most_slots = slots.index(max(slots))
    fullest = replace(
        mean,
        attention=tuple((1.0, *call) for call in calls[most_slots]),
        carried_attention=works[most_slots].carried_attention,
        targets=max(work.targets for work in works),
    )
    return HTaskWorks(steps, (fullest,))


def _by_step_and_replica(
    works: Sequence[MicrobatchWork], shape: HTaskShape
) -> tuple[tuple[WorkSum, ...], ...]:
    """Micro-batches in the order of :func:`muxtune.batches.layout_step`, step after step, added up."""
    m = shape.microbatches
    sums = [WorkSum.of_works(works[i : i + m]) for i in range(0, len(works), m)]
    return tuple(tuple(sums[i : i + shape.replicas]) for i in range(0, len(sums), shape.replicas))


def _sampled_steps(members: Sequence[TaskData]) -> set[int]:
    steps = min(each.task.steps for each in members)
    return {round(i * (steps - 1) / max(SAMPLED_STEPS - 1, 1)) for i in range(SAMPLED_STEPS)}


def _sample_carry_groups(members: Sequence[TaskData], shape: HTaskShape) -> HTaskWorks:
    """:func:`sample_works` where sequences spread over micro-batches: it matters where their parts lie."""
    groups = [group for step in _sampled_steps(members) for group in carry_groups(members, shape, step)]
    # The micro-batches of a carry group are open together, so it is their sum that counts.
    fullest = max(
        groups,
        key=lambda group: sum(
            attention_rows(work) + gathered_keys(work) + work.left_tokens for work in group
        ),
    )
    most_targets = [max(work.targets for work in place) for place in zip(*groups, strict=True)]
    return HTaskWorks(
        _by_step_and_replica(list(chain.from_iterable(groups)), shape),
        tuple(replace(work, targets=targets) for work, targets in zip(fullest, most_targets, strict=True)),
    )


class _Group(NamedTuple):
    """Sequences of a task that share a micro-batch."""

    rows: list[int]
    """Slots of attention of each sequence."""
    tokens: int
    """Tokens of the sequences in the stream."""
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
