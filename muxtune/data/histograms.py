"""Real length distributions of the datasets of the paper, for workloads without texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from muxtune.support.errors import SpecError

__all__ = ["LengthHistogram", "load_length_histogram"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthHistogram:
    """How many examples of a dataset have how many tokens.

    Not clipped: a task cuts the lengths at its own ``max_length``.
    """

    name: str
    lengths: NDArray[np.int64]
    """Distinct lengths in tokens, ascending."""
    counts: NDArray[np.int64]
    """Examples per length, each above 0."""

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Draw ``n`` independent lengths in tokens, ``[n]``."""
        return rng.choice(self.lengths, size=n, p=self.counts / self.counts.sum())


def load_length_histogram(name: str) -> LengthHistogram:
    """Length distribution of the training set ``name``: sst2, openbookqa or rte.

    Raises:
        SpecError: There is no such distribution.
    """
    known = _load_all()
    if name not in known:
        raise SpecError("dataset.lengths", name, f"one of {', '.join(sorted(known))}")
    return known[name]


@cache
def _load_all() -> dict[str, LengthHistogram]:
    facts = json.loads(files(__package__).joinpath("length_histograms.json").read_text("utf-8"))
    del facts["source"]  # a note for readers of the file
    return {name: _histogram(name, fact["length_counts"]) for name, fact in facts.items()}


def _histogram(name: str, length_counts: list[list[int]]) -> LengthHistogram:
    lengths, counts = np.array(length_counts, dtype=np.int64).T.copy()
    for shared in (lengths, counts):
        shared.flags.writeable = False  # every caller gets the same arrays
    return LengthHistogram(name=name, lengths=lengths, counts=counts)
