"""What a rank meets that is one task's fault: it stays with the step that it was met in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_MOST_CHARACTERS = 500


class Board(Protocol):
    """Where ranks leave texts for each other, before they tell that there are any."""

    def set(self, key: str, value: str, /) -> object:
        """Leave a text."""

    def get(self, key: str, /) -> bytes:
        """Read a text that is there."""


class Faults:
    """Faults of tasks that this rank has met.

    Args:
        rank: Number of the rank, for people.
        board: Where other ranks look for the words; None if there are none.
    """

    def __init__(self, rank: int = 0, board: Board | None = None) -> None:
        self._rank = rank
        self._board = board
        self._words: dict[tuple[str, int], str] = {}

    def note(self, task_id: str, step: int, error: Exception) -> None:
        """Note the first fault of a task's step.

        Args:
            task_id: Task whose fault it is.
            step: Step in which it was met.
            error: What it was.
        """
        if (task_id, step) in self._words:
            return
        lines = " ".join(str(error).split())[:_MOST_CHARACTERS]
        words = f"{type(error).__name__}: {lines} (rank {self._rank})"
        self._words[task_id, step] = words
        if self._board is not None:
            self._board.set(_key(task_id, step), words)

    def met(self, task_ids: Sequence[str], step: int) -> list[bool]:
        """Whether this rank has met a fault of each task in a step."""
        return [(task_id, step) in self._words for task_id in task_ids]

    def words(self, task_id: str, step: int) -> str:
        """What was wrong, once it is known that a rank has met it."""
        own = self._words.get((task_id, step))
        if own is not None or self._board is None:
            return own or "a fault"
        return self._board.get(_key(task_id, step)).decode()


def _key(task_id: str, step: int) -> str:
    return f"muxtune/fault/{task_id}/{step}"
