"""What the micro-batches of an hTask put through the backbone, sampled from its tasks' data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from muxtune.alignment import (
    HTaskShape,
    batched_calls,
    deal_sequences,
    group_tokens,
    place_groups,
)
from muxtune.attention import DEFAULT_ATTENTION, AttentionName, kept_calls
from muxtune.costs.compose import MicrobatchWork
from muxtune.dataset import TaskData
from muxtune.memory.kept import attention_rows, gathered_keys
from muxtune.planning.carried_works import carry_groups
from muxtune.planning.structure import HTaskChoice

SAMPLED_STEPS = 3
"""Steps whose real layouts are looked at; the static part of a micro-batch does not depend on the step."""


@dataclass(frozen=True, slots=True)
class HTaskWorks:
    """Work of an hTask's micro-batches over a few steps, spread over the run of its shortest task."""

    mean: MicrobatchWork
    """For prices."""
    fullest: tuple[MicrobatchWork, ...]
    """For memory: the mean, but with the most slots of attention and the most targets that one has. Where
    micro-batches form carry groups, those of the fullest group, in order, with the most targets that one of
    their place in a group has."""


def sample_works(
    htask: HTaskChoice, data: Mapping[str, TaskData], *, attention: AttentionName = DEFAULT_ATTENTION
) -> HTaskWorks:
    """Look at the micro-batches of the sampled steps, as :func:`muxtune.alignment.layout_step` lays them out.

    What matters here is which sequences share a micro-batch, not where they lie in it.

    Args:
        htask: Tasks and alignment.
        data: Per task id.
        attention: Backend whose slots count for memory; carry groups count as under the default. Prices are
            for calls of near-equal sequences under each, as a profile has them.
    """
    members = [data[task_id] for task_id in htask.task_ids]
    shape = htask.shape
    if shape.carry > 1:
        return _sample_carry_groups(members, shape)
    rows: list[list[int]] = []
    targets: list[int] = []
    task_tokens = np.zeros(len(members), dtype=np.int64)
    for step in _sampled_steps(members):
        dealt = [_dealt(each, step, shape) for each in members]
        sizes = [np.array([[group.tokens for group in groups]]) for groups in dealt]
        placed = [each[0].tolist() for each in place_groups(sizes, shape.alignment)]
        for microbatch in range(shape.groups):
            groups = [dealt[task][placed[task][microbatch]] for task in range(len(members))]
            rows.append(list(chain.from_iterable(group.rows for group in groups)))
            targets.append(sum(group.targets for group in groups))
        task_tokens += [int(each.sum()) for each in sizes]
    calls = [batched_calls(each) for each in rows]
    share = 1 / len(calls)
    mean = MicrobatchWork(
        tokens=shape.tokens,
        task_tokens=tuple(round(tokens / len(calls)) for tokens in task_tokens.tolist()),
        loras=tuple(each.task.peft for each in members),
        attention=tuple((n * share, *call) for call, n in sorted(Counter(chain(*calls)).items())),
        targets=sum(targets) * share,
    )
    kept = calls if attention == DEFAULT_ATTENTION else [kept_calls(each, attention) for each in rows]
    most_slots = max(kept, key=lambda each: sum(sequences * slots for sequences, slots in each))
    return HTaskWorks(
        mean=mean,
        fullest=(
            replace(mean, attention=tuple((1.0, *call) for call in most_slots), targets=float(max(targets))),
        ),
    )


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
        mean=_average(list(chain.from_iterable(groups))),
        fullest=tuple(
            replace(work, targets=targets) for work, targets in zip(fullest, most_targets, strict=True)
        ),
    )


def _average(works: Sequence[MicrobatchWork]) -> MicrobatchWork:
    share = 1 / len(works)
    calls = Counter(call for work in works for call in work.attention)
    carried = Counter(call for work in works for call in work.carried_attention)
    spans = zip(*(work.task_tokens for work in works), strict=True)
    return MicrobatchWork(
        tokens=works[0].tokens,
        task_tokens=tuple(round(share * sum(tokens)) for tokens in spans),
        loras=works[0].loras,
        attention=tuple((n * share, *call[1:]) for call, n in sorted(calls.items())),
        targets=share * sum(work.targets for work in works),
        carried_attention=tuple((n * share, *call[1:]) for call, n in sorted(carried.items())),
        left_tokens=share * sum(work.left_tokens for work in works),
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
