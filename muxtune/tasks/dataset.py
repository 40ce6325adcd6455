"""The data of a task: its examples, and the order in which its steps take them.

Planner, runtime and solo reference all read their data here, so a step means the same sequences everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muxtune.model import ModelSpec
from muxtune.peft import extra
from muxtune.support.errors import SpecError
from muxtune.tasks.examples import (
    HISTOGRAM_EXAMPLES,
    DrawnExamples,
    Example,
    FileExamples,
    MeasuredExamples,
    drawn_examples,
    make_frame,
)
from muxtune.tasks.jsonl import open_jsonl
from muxtune.tasks.order import StepOrder, step_order
from muxtune.tasks.token_cache import TextTokens, token_folder, tokenized_file
from muxtune.tasks.tokenizer import Tokenizer, load_tokenizer
from muxtune.tasks.workload import BosRule, DatasetSpec, PeftTask

__all__ = [
    "HISTOGRAM_EXAMPLES",
    "DrawnExamples",
    "Example",
    "TaskData",
    "load_task_data",
    "with_digest",
]

_LOG = logging.getLogger("muxtune")


class TaskData:
    """The examples of one task and their order.

    Args:
        task: Task whose data it is.
        examples: Examples in file order.
    """

    def __init__(self, task: PeftTask, examples: Sequence[Example]) -> None:
        self.task = task
        self.examples = examples
        self._extra = extra(task.peft)
        self._order = _order(task, len(examples))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of a stream that each example takes, in file order.

        Virtual tokens of the task's method, then the tokens of the example.
        """
        return self.example_lengths + self._extra.rows

    @cached_property
    def example_lengths(self) -> NDArray[np.int64]:
        """Tokens per example, in file order; 0 for one of a file that no step takes."""
        if isinstance(self.examples, MeasuredExamples):
            return self.examples.lengths
        return np.array([len(example.tokens) for example in self.examples])

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Predicted tokens per example, alike."""
        if isinstance(self.examples, MeasuredExamples):
            return self.examples.targets
        return np.array([example.target_tokens for example in self.examples])

    @cached_property
    def step_tokens(self) -> float:
        """Tokens of the examples of a step, the mean over all steps."""
        return float(self.example_lengths @ self._order.times_used) / self.task.steps

    @cached_property
    def step_targets(self) -> float:
        """Predicted tokens of a step, the mean over all steps."""
        return float(self.targets @ self._order.times_used) / self.task.steps

    @cached_property
    def step_keys(self) -> float:
        """Keys that a step's tokens attend to, those in front included, summed; the mean over all steps."""
        in_front = self._extra.rows + self._extra.keys
        keys = self.example_lengths * (self.example_lengths + 1 + 2 * in_front) // 2
        return float(keys @ self._order.times_used) / self.task.steps

    @property
    def mean_length(self) -> float:
        """Rows of a sequence, the mean over all that the steps take."""
        return self.step_tokens / self.task.global_batch_size + self._extra.rows

    @cached_property
    def longest(self) -> int:
        """Rows of the longest sequence of any step."""
        return int(self.lengths[self._order.used].max())

    @property
    def distinct_steps(self) -> int:
        """Steps after which the batches repeat, or all of the task's if none does."""
        return self._order.distinct_steps

    def order(self, steps: int) -> NDArray[np.int64]:
        """Example indices of the first ``steps`` steps, ``[steps * global_batch_size]``."""
        return self._order.first(steps)

    def batch(self, step: int) -> list[Example]:
        """The ``global_batch_size`` examples of optimizer step ``step`` (from 0)."""
        return [self.examples[i] for i in self.step_indices(step).tolist()]

    def batch_lengths(self, step: int) -> NDArray[np.int64]:
        """Rows of each sequence of step ``step``, ``[global_batch_size]``."""
        return self.lengths[self.step_indices(step)]

    def effective_tokens(self, step: int) -> int:
        """Tokens of the examples of step ``step``."""
        return int(self.example_lengths[self.step_indices(step)].sum())

    def step_indices(self, step: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Example indices of a step, ``[global_batch_size]``; of several in rows."""
        return self._order.of(step)


def load_task_data(task: PeftTask, model: ModelSpec, tokenizer: Tokenizer | None = None) -> TaskData:
    """Read, tokenize and truncate the examples that a task takes from its dataset.

    Raises:
        UserError: Missing or malformed file (with the line), or a file that changed since it was planned.
    """
    dataset = task.dataset
    if dataset.lengths is not None:
        return TaskData(task, drawn_examples(dataset.lengths, task.seed, task.max_length, model.vocab))
    tokenizer = tokenizer or load_tokenizer(model)
    assert dataset.path is not None  # DatasetSpec: exactly one of the two
    field = f"tasks.{task.id}.dataset"
    frame = make_frame(tokenizer, task.max_length, dataset.bos, f"{field}.bos")
    file = open_jsonl(dataset.path, f"{field}.path")
    if dataset.sha256 is not None and file.digest != dataset.sha256:
        expected = f"the file that the plan was made for (sha256 {dataset.sha256[:12]}..., plan again)"
        raise SpecError(f"{field}.path", str(dataset.path), expected)
    source = tokenized_file(file, tokenizer, dataset.allow_special, token_folder())
    used = _order(task, len(file)).used
    _say_what_texts_have(dataset.path, source.texts(used), tokenizer, dataset.bos)
    return TaskData(task, FileExamples(source, frame, len(file), used))


def with_digest(dataset: DatasetSpec) -> DatasetSpec:
    """The dataset with the digest of its file, for a plan (``UserError`` where it cannot be read)."""
    if dataset.path is None:
        return dataset
    return dataset.model_copy(update={"sha256": open_jsonl(dataset.path, "dataset.path").digest})


def _order(task: PeftTask, examples: int) -> StepOrder:
    return step_order(examples, task.global_batch_size, task.steps, task.seed if task.shuffle else None)


def _say_what_texts_have(path: Path, texts: TextTokens, tokenizer: Tokenizer, rule: BosRule) -> None:
    """Say once where texts bring BOS or EOS along: there they are not put a second time."""
    begin = 0 if rule == "never" or tokenizer.bos_id is None else int((texts.first == tokenizer.bos_id).sum())
    end = int((texts.last == tokenizer.eos_id).sum())
    had = [f"{n} {verb}" for n, verb in ((begin, "begin with BOS"), (end, "end with EOS")) if n]
    message = f"{path}: of {len(texts.positions)} texts {' and '.join(had)} already, which is not put twice"
    if had and message not in _SAID:
        _SAID.add(message)
        _LOG.warning(message)


_SAID: set[str] = set()
