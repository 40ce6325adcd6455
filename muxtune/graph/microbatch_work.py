"""What one micro-batch puts through the backbone; operators, prices and memory are derived from it."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.peft import Specs


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchWork:
    """One micro-batch of an hTask, as the backbone sees it."""

    tokens: int
    """Tokens of the stream, padding included."""
    task_tokens: tuple[int, ...]
    """Tokens of each task's span."""
    pefts: Specs
    """PEFT method of each task, with its parameters."""
    attention: tuple[tuple[float, int, int], ...]
    """Batched attention calls as (how many, sequences, length); averages of micro-batches have fractions."""
    targets: float
    """Predicted tokens; may be an average too."""
    carried_attention: tuple[tuple[float, int, int, int], ...] = ()
    """Calls for sequences that began in earlier micro-batches, or that have keys of their task in front, as
    (how many, sequences, queries, keys)."""
    left_tokens: float = 0.0
    """Tokens whose keys and values later micro-batches attend to."""

    @property
    def sequences(self) -> float:
        """Sequences that have tokens here."""
        begun = sum(calls * sequences for calls, sequences, _ in self.attention)
        return begun + sum(calls * sequences for calls, sequences, _, _ in self.carried_attention)

    def __post_init__(self) -> None:
        assert len(self.task_tokens) == len(self.pefts), (self.task_tokens, self.pefts)
