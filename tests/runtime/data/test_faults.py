"""What ranks tell each other of a task's fault."""

from __future__ import annotations

from runtime.data.faults import Faults


class Board:
    """A store of torch's, as far as faults use it."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._texts[key] = value

    def get(self, key: str) -> bytes:
        return self._texts[key].encode()


def test_the_words_of_another_rank_are_found_on_the_board():
    board = Board()
    first, second = Faults(1, board), Faults(2, board)
    first.note("a", 3, ValueError("no\nsuch kernel"))
    assert first.met(["a", "b"], 3) == [True, False]
    assert (first.met(["a"], 4), second.met(["a"], 3)) == ([False], [False])
    assert first.words("a", 3) == second.words("a", 3) == "ValueError: no such kernel (rank 1)"


def test_the_first_fault_of_a_step_counts_and_is_one_line_of_some_length():
    faults = Faults()
    faults.note("a", 0, OSError("x" * 10_000 + "\n"))
    faults.note("a", 0, ValueError("later"))
    words = faults.words("a", 0)
    assert words.startswith("OSError: xxx")
    assert words.endswith("x (rank 0)")
    assert len(words) < 600
