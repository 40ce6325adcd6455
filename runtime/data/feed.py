"""Micro-batches of every step as tensors, made just in time and alike on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from muxtune.batches import (
    HTaskShape,
    MicrobatchLayout,
    Span,
    layout_step,
    phase_tokens,
    phases,
    step_group_tokens,
)
from muxtune.peft import extra
from muxtune.plan import IterationTokens, Plan
from muxtune.support.errors import SpecError, UserError
from muxtune.tasks import Example, TaskData, load_task_data, load_tokenizer
from runtime.attention.carried_kv import CarriedKv
from runtime.data.batch import MicrobatchTensors, build_microbatch
from runtime.data.faults import Faults

SHORTER_AFTER = 2
"""Steps for which the stream stays as long as it was after a task has left before its end: messages of so
many steps may be posted by then."""


@dataclass(slots=True)
class _Step:
    """Layouts and examples of one hTask's step, until its last micro-batch is taken."""

    number: int
    layouts: list[MicrobatchLayout]
    batches: list[list[Example]]


class Feed:
    """Deals out the micro-batches of a plan.

    Args:
        plan: Plan that has been checked.
        data: Data of each task, by task id.
        device: Where the tensors go.
        replica: Number of the replica whose micro-batches are dealt out.
        faults: Gets those of data that cannot be read any more, or means nothing.
    """

    def __init__(
        self,
        plan: Plan,
        data: Mapping[str, TaskData],
        device: str = "cpu",
        *,
        replica: int = 0,
        faults: Faults | None = None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._replica = replica
        self.faults = Faults() if faults is None else faults
        self._data = [[data[task_id] for task_id in htask.task_ids] for htask in plan.htasks]
        self._shapes = [plan.shape(htask.id) for htask in plan.htasks]
        self._extras = [[extra(each.task.peft) for each in members] for members in self._data]
        self._dropout_seeds = [
            {i: each.task.seed for i, each in enumerate(members) if each.task.peft.drops}
            for members in self._data
        ]
        self._stops = {task.id: task.steps for task in plan.tasks}
        self._tokens = [_stream_lengths(plan, htask.id, data) for htask in plan.htasks]
        self._current: dict[int, _Step] = {}
        self._carried: dict[int, CarriedKv] = {}

    def microbatch(self, htask: int, number: int, *, without: Collection[str] = ()) -> MicrobatchTensors:
        """Micro-batch ``number``, counted over all steps. Cheap in order; a carry group must be.

        Args:
            htask: Number of the hTask.
            number: Number of the micro-batch.
            without: Tasks whose tokens are left out; the others lie where they would.
        """
        step, position = divmod(number, self._shapes[htask].microbatches)
        current = self._current.get(htask)
        if current is None or current.number != step:
            current = self._current[htask] = self._build_step(htask, step)
        task_ids = self._plan.htasks[htask].task_ids
        first = position - position % self._shapes[htask].carry
        layout = current.layouts[position]
        return build_microbatch(
            _without(layout, [task_ids.index(task_id) for task_id in without]) if without else layout,
            current.batches,
            self._device,
            task_ids=task_ids,
            attention=self._plan.execution.attention,
            carried=self._carried_kv(htask, position),
            earlier=current.layouts[first:position],
            extras=self._extras[htask],
            dropout_seeds=self._dropout_seeds[htask],
            step=step,
        )

    def _carried_kv(self, htask: int, position: int) -> CarriedKv | None:
        """Keys and values of a carry group; from its last micro-batch on, only the group keeps them alive."""
        carry = self._shapes[htask].carry
        if carry == 1:
            return None
        if position % carry == 0:
            self._carried[htask] = CarriedKv()
        return self._carried.pop(htask) if position % carry == carry - 1 else self._carried[htask]

    def tokens(self, htask: int, step: int) -> int:
        """Tokens of each micro-batch of a step, without tasks that have finished; 0 if all have."""
        return next((tokens for phase, tokens in self._tokens[htask] if step < phase.stop), 0)

    def leave(self, task_id: str, step: int) -> None:
        """Deal out nothing of a task from a step on, before any rank has asked for that step.

        The stream gets shorter :data:`SHORTER_AFTER` steps later.
        """
        self._stops[task_id] = min(step, self._stops[task_id])
        for h, members in enumerate(self._data):
            if all(data.task.id != task_id for data in members):
                continue
            first = step + SHORTER_AFTER
            before = [
                (range(phase.start, min(phase.stop, first)), tokens)
                for phase, tokens in self._tokens[h]
                if phase.start < first
            ]
            self._tokens[h] = before + self._lengths_from(h, first)

    def _lengths_from(self, htask: int, first: int) -> list[tuple[range, int]]:
        """Length of the stream in each phase from a step on."""
        members = [data for data in self._data[htask] if self._stops[data.task.id] > first]
        stops = sorted({self._stops[data.task.id] for data in members})
        training = [
            (range(start, stop), [data for data in members if self._stops[data.task.id] >= stop])
            for start, stop in pairwise([first, *stops])
        ]
        return _phase_lengths(self._shapes[htask], members, training)

    def target_tokens(self, htask: int, step: int) -> dict[str, int]:
        """Target tokens in the global batch of each task that still trains, in the order of spans."""
        return {
            data.task.id: int(data.targets[data.step_indices(step)].sum())
            for data in self._data[htask]
            if self._active(data, step)
        }

    def _active(self, data: TaskData, step: int) -> bool:
        return step < self._stops[data.task.id]

    def effective_tokens(self, task_id: str, step: int) -> int:
        """Tokens of the examples of a task's step."""
        (data,) = (data for members in self._data for data in members if data.task.id == task_id)
        return data.effective_tokens(step)

    def step_tokens(self, step: int) -> IterationTokens:
        """Tokens of all tasks in iteration ``step``, on all replicas."""
        active = [data for row in self._data for data in row if self._active(data, step)]
        sizes = [
            [data.task.global_batch_size if self._active(data, step) else 0 for data in row]
            for row in self._data
        ]
        return IterationTokens(
            all=sum(
                shape.step_tokens(sizes[h], tokens=self.tokens(h, step))
                for h, shape in enumerate(self._shapes)
            ),
            billed=sum(data.task.global_batch_size * data.task.max_length for data in active),
            effective=sum(data.effective_tokens(step) for data in active),
        )

    def _build_step(self, htask: int, step: int) -> _Step:
        nothing = np.zeros(0, dtype=np.int64)
        rows = self._data[htask]
        lengths = [data.batch_lengths(step) if self._active(data, step) else nothing for data in rows]
        batches = [self._batch(data, step) if self._active(data, step) else [] for data in rows]
        tokens = self.tokens(htask, step)
        m = self._shapes[htask].microbatches
        if not any(batches):  # all tasks have failed
            return _Step(step, [MicrobatchLayout(tokens, (), ())] * m, batches)
        layouts = layout_step(self._shapes[htask], lengths, tokens=tokens)
        return _Step(step, layouts[self._replica * m : (self._replica + 1) * m], batches)

    def _batch(self, data: TaskData, step: int) -> list[Example]:
        """Examples of a task's step; if they are not what was measured, others of the same lengths."""
        lengths = data.example_lengths[data.step_indices(step)]
        targets = data.targets[data.step_indices(step)]
        try:
            batch = data.batch(step)
            _check_examples(batch, lengths.tolist(), self._plan.model.vocab)
        except Exception as error:  # whatever it is, it is this task's
            self.faults.note(data.task.id, step, error)
            pairs = zip(lengths.tolist(), targets.tolist(), strict=True)
            return [Example(np.zeros(length, dtype=np.int64), length - own) for length, own in pairs]
        return batch


def _check_examples(batch: Sequence[Example], lengths: Sequence[int], vocab: int) -> None:
    for example, length in zip(batch, lengths, strict=True):
        if len(example.tokens) != length:
            found = len(example.tokens)
            raise UserError(f"the data has changed: an example has {found} tokens, had {length}")
        least, most = int(example.tokens.min()), int(example.tokens.max())
        if least < 0 or most >= vocab:
            odd = least if least < 0 else most
            raise UserError(f"token {odd} is not in the vocabulary, which has {vocab}")


def _without(layout: MicrobatchLayout, tasks: Collection[int]) -> MicrobatchLayout:
    """A layout with nothing in it of some tasks; their spans are empty."""
    return MicrobatchLayout(
        layout.tokens,
        tuple(
            Span(span.task, span.start, span.start) if span.task in tasks else span for span in layout.spans
        ),
        tuple(segment for segment in layout.segments if segment.task not in tasks),
    )


def load_plan_data(plan: Plan) -> dict[str, TaskData]:
    """Examples of all tasks of a plan.

    Raises:
        UserError: A dataset is missing, malformed, or not the one that the plan was made for.
    """
    reads_texts = any(task.dataset.path is not None for task in plan.tasks)
    tokenizer = load_tokenizer(plan.model) if reads_texts else None
    return {task.id: load_task_data(task, plan.model, tokenizer) for task in plan.tasks}


def check_room(plan: Plan, data: Mapping[str, TaskData], where: str) -> None:
    """Refuse streams that are too short for their sequences.

    Raises:
        SpecError: Names the field, its value and what the sequences need.
    """
    for htask in plan.htasks:
        needed = _needed_tokens(plan, htask.id, data)[0][1]
        if needed > htask.tokens_per_microbatch:
            field = f"{where}: derived.htasks[{htask.id}].tokens_per_microbatch"
            expected = f"at least {needed}, what its sequences need"
            raise SpecError(field, htask.tokens_per_microbatch, expected)


def _stream_lengths(plan: Plan, htask: int, data: Mapping[str, TaskData]) -> list[tuple[range, int]]:
    """Length of the stream in each phase: the plan's while all tasks train, then what the rest needs."""
    (first, _), *others = _needed_tokens(plan, htask, data)
    return [(first, plan.htasks[htask].tokens_per_microbatch), *others]


def _needed_tokens(plan: Plan, htask: int, data: Mapping[str, TaskData]) -> list[tuple[range, int]]:
    shape = plan.shape(htask)
    members = [data[task_id] for task_id in plan.htasks[htask].task_ids]
    return _phase_lengths(shape, members, [(phase, members) for phase in phases(members)])


def _phase_lengths(
    shape: HTaskShape, members: Sequence[TaskData], training: Sequence[tuple[range, Sequence[TaskData]]]
) -> list[tuple[range, int]]:
    """Length of the stream in phases of which each has tasks that train in it."""
    sizes = {
        data.task.id: step_group_tokens(data, shape.alignment, shape.carry_groups, shape.row_tokens)
        for data in members
    }
    return [
        (
            phase,
            phase_tokens(
                active,
                [sizes[data.task.id] for data in active],
                shape.alignment,
                phase,
                row_tokens=shape.row_tokens,
                carry=shape.carry,
            ),
        )
        for phase, active in training
    ]
