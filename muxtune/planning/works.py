"""What the micro-batches of an hTask put through the backbone, sampled from its tasks' data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from muxtune.alignment import MicrobatchLayout, attention_calls, layout_step
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
    """Lay out the sampled steps.

    Args:
        htask: Tasks and alignment.
        data: Per task id.
    """
    members = [data[task_id] for task_id in htask.task_ids]
    steps = min(each.task.steps for each in members)
    layouts: list[MicrobatchLayout] = []
    targets: list[int] = []
    for step in {round(i * (steps - 1) / max(SAMPLED_STEPS - 1, 1)) for i in range(SAMPLED_STEPS)}:
        batches = [each.batch(step) for each in members]
        for layout in layout_step(htask.shape, [each.batch_lengths(step) for each in members]):
            layouts.append(layout)
            targets.append(sum(batches[s.task][s.sequence].target_tokens for s in layout.segments))
    share = 1 / len(layouts)
    calls = [attention_calls(layout) for layout in layouts]
    mean = MicrobatchWork(
        tokens=htask.shape.tokens,
        task_tokens=_mean_task_tokens(layouts, len(members)),
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


def _mean_task_tokens(layouts: Sequence[MicrobatchLayout], tasks: int) -> tuple[int, ...]:
    total = [0] * tasks
    for layout in layouts:
        for span in layout.spans:
            total[span.task] += span.stop - span.start
    return tuple(round(tokens / len(layouts)) for tokens in total)
