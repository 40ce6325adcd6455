"""Examples of a task as token ids: drawn from a length distribution, or read from a file when needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import overload

import numpy as np
from numpy.typing import NDArray

from muxtune.data.histograms import load_length_histogram
from muxtune.support.errors import SpecError
from muxtune.tasks.token_cache import TextTokens, TokenizedFile
from muxtune.tasks.tokenizer import Tokenizer
from muxtune.tasks.workload import BosRule

Ints = NDArray[np.int64]

HISTOGRAM_EXAMPLES = 2048
"""Examples drawn for a dataset that is given by its length distribution."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: ``tokens``, of which those from ``target_start`` on are predicted and learned."""

    tokens: Ints
    target_start: int

    @property
    def target_tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.target_start


class MeasuredExamples(Sequence[Example]):
    """Examples whose lengths are known before their tokens: planning needs no more."""

    lengths: Ints
    """Tokens of each example, in file order; 0 for one that is not used."""
    targets: Ints
    """Predicted tokens of each, alike."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> list[Example]: ...
    def __getitem__(self, position: int | slice) -> Example | list[Example]:
        """One example, or several."""
        places = range(len(self))[position]
        return self._example(places) if isinstance(places, int) else [self._example(each) for each in places]

    @abstractmethod
    def _example(self, position: int) -> Example: ...


class DrawnExamples(MeasuredExamples):
    """Random tokens, drawn when somebody first looks at them.

    Args:
        lengths: Tokens of each example. The last two are its targets, as of a class label and EOS.
        generator: Draws the tokens, in order.
        vocab: Tokens are below it.
    """

    def __init__(self, lengths: Ints, generator: np.random.Generator, vocab: int) -> None:
        self.lengths = lengths
        self.target_starts: Ints = np.maximum(lengths - 2, 1)
        self.targets = lengths - self.target_starts
        self._generator = generator
        self._vocab = vocab

    def _example(self, position: int) -> Example:
        return self._examples[position]

    @cached_property
    def _examples(self) -> list[Example]:
        tokens = self._generator.integers(0, self._vocab, size=int(self.lengths.sum()), dtype=np.int64)
        each = np.split(tokens, np.cumsum(self.lengths)[:-1])
        return [Example(*pair) for pair in zip(each, self.target_starts.tolist(), strict=True)]


@lru_cache(maxsize=64)  # about 1 MB each; the problems of a sweep draw the same ones again and again
def drawn_examples(histogram: str, seed: int, max_length: int, vocab: int) -> DrawnExamples:
    """Random tokens with lengths from a histogram."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(load_length_histogram(histogram).sample(generator, HISTOGRAM_EXAMPLES), max_length)
    return DrawnExamples(lengths, generator, vocab)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a task puts around the tokens of a text, and how long it lets them be."""

    bos: int | None
    """Token in front; None for none. A text that begins with it has it already."""
    eos: int
    """Token at the end. A text that ends with it has it already."""
    max_length: int

    def enclose(self, head: Sequence[int] | Ints, tail: Sequence[int] | Ints) -> Example:
        """BOS + prompt + completion + EOS; targets are the completion and EOS.

        Too long a sequence loses the left end of its prompt; if the completion alone is too long, its right
        end.

        Args:
            head: Tokens of the prompt.
            tail: Tokens of the completion.
        """
        if self.bos is not None:
            if len(head) and head[0] == self.bos:
                head = head[1:]
            elif not len(head) and len(tail) and tail[0] == self.bos:
                tail = tail[1:]
        if len(tail) and tail[-1] == self.eos:
            tail = tail[:-1]
        front = [] if self.bos is None else [self.bos]
        room = self.max_length - len(front) - len(tail) - 1
        head = head[len(head) - min(len(head), max(room, 0)) :]
        tokens = [*front, *head, *tail, self.eos][: self.max_length]
        # The first token of a sequence has nothing before it that could predict it.
        target_start = max(len(front) + len(head), 1)
        return Example(np.array(tokens, dtype=np.int64), target_start)

    def measure(self, texts: TextTokens) -> tuple[Ints, Ints]:
        """Tokens and predicted tokens of what :meth:`enclose` makes of each text."""
        head, tail = texts.prompt.astype(np.int64), texts.completion.astype(np.int64)
        front = 0 if self.bos is None else 1
        if self.bos is not None:
            begins = texts.first == self.bos
            tail = tail - (begins & (head == 0))
            head = head - (begins & (head > 0))
        tail = tail - ((texts.last == self.eos) & (tail > 0))
        head = np.minimum(head, np.maximum(self.max_length - front - tail - 1, 0))
        lengths = np.minimum(front + head + tail + 1, self.max_length)
        return lengths, lengths - np.maximum(front + head, 1)


class FileExamples(MeasuredExamples):
    """Examples of a file.

    Args:
        source: Tokens of the file.
        frame: What the task puts around them.
        n: Examples of the file.
        used: Examples that the task takes, ascending; they are tokenized now.
    """

    def __init__(self, source: TokenizedFile, frame: Frame, n: int, used: Ints) -> None:
        self._source = source
        self._frame = frame
        self.lengths, self.targets = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.lengths[used], self.targets[used] = frame.measure(source.texts(used))

    def _example(self, position: int) -> Example:
        return self._frame.enclose(*self._source.ids(position))


def make_frame(tokenizer: Tokenizer, max_length: int, rule: BosRule, where: str) -> Frame:
    """What a task with this tokenizer puts around its texts.

    Raises:
        SpecError: BOS is asked for, and the tokenizer has none.
    """
    if rule == "always" and tokenizer.bos_id is None:
        raise SpecError(where, rule, "auto or never: the tokenizer has no BOS token")
    wanted = rule == "always" or (rule == "auto" and tokenizer.adds_bos)
    return Frame(tokenizer.bos_id if wanted else None, tokenizer.eos_id, max_length)
