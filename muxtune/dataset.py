"""Examples of a task as token ids, and the order in which its steps take them.

Planner, runtime and solo reference all read their data here, so a step means the same sequences everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from muxtune.data.histograms import load_length_histogram
from muxtune.errors import SpecError, UserError
from muxtune.model import ModelSpec
from muxtune.tokenizer import Tokenizer, load_tokenizer
from muxtune.workload import DatasetSpec, PeftTask

HISTOGRAM_EXAMPLES = 2048
"""Examples drawn for a dataset that is given by its length distribution."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: ``tokens``, of which those from ``target_start`` on are predicted and learned."""

    tokens: NDArray[np.int64]
    target_start: int

    @property
    def target_tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.target_start


class DrawnExamples(Sequence[Example]):
    """Random tokens, drawn when somebody first looks at them: planning needs their lengths alone.

    Args:
        lengths: Tokens of each example. The last two are its targets, as of a class label and EOS.
        generator: That draws the tokens, in order.
        vocab: Tokens are below it.
    """

    def __init__(self, lengths: NDArray[np.int64], generator: np.random.Generator, vocab: int) -> None:
        self.lengths = lengths
        self.target_starts: NDArray[np.int64] = np.maximum(lengths - 2, 1)
        self._generator = generator
        self._vocab = vocab

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> list[Example]: ...
    def __getitem__(self, position: int | slice) -> Example | list[Example]:
        """One example, or several."""
        return self._examples[position]

    @cached_property
    def _examples(self) -> list[Example]:
        tokens = self._generator.integers(0, self._vocab, size=int(self.lengths.sum()), dtype=np.int64)
        each = np.split(tokens, np.cumsum(self.lengths)[:-1])
        return [Example(*pair) for pair in zip(each, self.target_starts.tolist(), strict=True)]


class TaskData:
    """The examples of one task and their order.

    Args:
        task: Whose data.
        examples: In file order.
    """

    def __init__(self, task: PeftTask, examples: Sequence[Example]) -> None:
        self.task = task
        self.examples = examples

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example, in file order."""
        if isinstance(self.examples, DrawnExamples):
            return self.examples.lengths
        return np.array([len(example.tokens) for example in self.examples])

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Predicted tokens per example, in file order."""
        if isinstance(self.examples, DrawnExamples):
            return self.examples.lengths - self.examples.target_starts
        return np.array([example.target_tokens for example in self.examples])

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Example index of every sequence that the task's own steps take."""
        return self.order(self.task.steps)

    def order(self, steps: int) -> NDArray[np.int64]:
        """Example indices of the first ``steps`` steps, ``[steps * global_batch_size]``."""
        wanted = steps * self.task.global_batch_size
        epochs = epoch_orders(len(self.examples), self.task.seed, shuffle=self.task.shuffle)
        whole_epochs = -(-wanted // len(self.examples))
        return np.concatenate([next(epochs) for _ in range(whole_epochs)])[:wanted]

    def batch(self, step: int) -> list[Example]:
        """The ``global_batch_size`` examples of optimizer step ``step`` (from 0)."""
        return [self.examples[i] for i in self.step_indices(step)]

    def batch_lengths(self, step: int) -> NDArray[np.int64]:
        """Tokens of each sequence of step ``step``, ``[global_batch_size]``."""
        return self.lengths[self.step_indices(step)]

    def step_indices(self, step: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Example indices of a step, ``[global_batch_size]``; of several in rows."""
        return self._order.reshape(self.task.steps, self.task.global_batch_size)[step]


def epoch_orders(n: int, seed: int, *, shuffle: bool) -> Iterator[NDArray[np.int64]]:
    """Order of ``n`` examples for epoch after epoch.

    With ``shuffle``, the permutations that one ``torch.Generator().manual_seed(seed)`` gives to successive
    ``torch.randperm(n, generator=...)``. The planner has no torch, so the generator (MT19937, seeded with
    the low 32 bits) and the shuffle (swap ``i`` with ``i + draw % (n - i)``) are repeated here; a test
    compares them with torch's.
    """
    if not shuffle:
        while True:
            yield np.arange(n)
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    while True:
        order = np.arange(n)
        draws = generator.randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32)
        for i, draw in enumerate(draws):
            j = i + int(draw) % (n - i)
            order[i], order[j] = order[j], order[i]
        yield order


def load_task_data(task: PeftTask, model: ModelSpec, tokenizer: Tokenizer | None = None) -> TaskData:
    """Read, tokenize and truncate the dataset of a task.

    Raises:
        UserError: Missing or malformed file (with the line), or a file that changed since it was planned.
    """
    if task.dataset.lengths is not None:
        return TaskData(task, _drawn_examples(task.dataset.lengths, task.seed, task.max_length, model.vocab))
    tokenizer = tokenizer or load_tokenizer(model)
    assert task.dataset.path is not None  # DatasetSpec: exactly one of the two
    path, where = task.dataset.path, f"tasks.{task.id}.dataset.path"
    content = _read(path, where)
    digest = hashlib.sha256(content).hexdigest()
    if task.dataset.sha256 is not None and digest != task.dataset.sha256:
        expected = f"the file that the plan was made for (sha256 {task.dataset.sha256[:12]}..., plan again)"
        raise SpecError(where, str(path), expected)
    examples = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            prompt, completion = _parse_line(line, f"{path}:{number}")
            examples.append(make_example(prompt, completion, tokenizer, task.max_length))
    if not examples:
        raise SpecError(where, str(path), "at least one example")
    return TaskData(task, examples)


def with_digest(dataset: DatasetSpec) -> DatasetSpec:
    """The dataset with the digest of its file, for a plan (``UserError`` where it cannot be read)."""
    if dataset.path is None:
        return dataset
    digest = hashlib.sha256(_read(dataset.path, "dataset.path")).hexdigest()
    return dataset.model_copy(update={"sha256": digest})


def make_example(prompt: str | None, completion: str, tokenizer: Tokenizer, max_length: int) -> Example:
    """BOS + prompt + completion + EOS, each tokenized alone; targets are the completion and EOS.

    Too long a sequence loses the left end of its prompt; if the completion alone is too long, its right end.
    ``prompt`` is None for plain text, whose tokens are all targets.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    head = tokenizer.encode(prompt) if prompt else []
    targets = [*tokenizer.encode(completion), tokenizer.eos_id]
    room = max_length - len(bos) - len(targets)
    head = head[len(head) - min(len(head), max(room, 0)) :]
    tokens = [*bos, *head, *targets][:max_length]
    # The first token of a sequence has nothing before it that could predict it.
    target_start = max(len(bos) + len(head), 1)
    return Example(np.array(tokens, dtype=np.int64), target_start)


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(where, str(path), f"a readable JSONL file ({error.strerror})") from error


def _parse_line(line: bytes, where: str) -> tuple[str | None, str]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # fails on half a surrogate pair, fine in JSON
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if isinstance(record, dict):
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            return record["prompt"], record["completion"]
        if isinstance(record.get("text"), str) and record["text"]:
            return None, record["text"]
    raise SpecError(where, record, 'an object with the strings "prompt" and "completion", or "text"')


@lru_cache(maxsize=64)  # about 1 MB each; the problems of a sweep draw the same ones again and again
def _drawn_examples(histogram: str, seed: int, max_length: int, vocab: int) -> DrawnExamples:
    """Random tokens with lengths from a histogram."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(load_length_histogram(histogram).sample(generator, HISTOGRAM_EXAMPLES), max_length)
    return DrawnExamples(lengths, generator, vocab)
