"""Order in which a task's steps take examples: as in the file, or shuffled for each epoch as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import islice
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def epoch_orders(n: int, seed: int, *, shuffle: bool) -> Iterator[Ints]:
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
    epochs = 1
    while True:
        draws = generator.randint(0, 2**32, size=(epochs, max(n - 1, 0)), dtype=np.uint32)
        yield from _shuffled(n, draws)
        epochs = min(2 * epochs, max(1, _DRAWS // n))


_DRAWS = 1 << 21
"""Random numbers that are drawn at once, at most."""

_TOGETHER = 64
"""Epochs from which on it is faster to swap in all of them at once than in one after the other."""


def _shuffled(n: int, draws: NDArray[np.uint32]) -> Iterator[Ints]:
    """Permutations of ``n`` from their draws, ``[epochs, n - 1]``."""
    left = n - np.arange(n - 1)
    if len(draws) < _TOGETHER:
        for row in draws:
            order = list(range(n))
            for i, offset in enumerate((row % left).tolist()):
                order[i], order[i + offset] = order[i + offset], order[i]
            yield np.array(order, dtype=np.int64)
        return
    partner = np.arange(n - 1)[:, None] + (draws % left).T
    orders = np.repeat(np.arange(n)[:, None], len(draws), axis=1)
    epochs = np.arange(len(draws))
    for i, j in enumerate(partner):
        swapped = orders[j, epochs]
        orders[j, epochs] = orders[i]
        orders[i] = swapped
    yield from orders.T


class StepOrder:
    """Examples of every step of a task.

    Args:
        n: Examples that there are.
        batch: Examples of a step.
        steps: Steps of the task.
        seed: Seed of the shuffling; None for file order.
    """

    def __init__(self, n: int, batch: int, steps: int, seed: int | None) -> None:
        self._n = n
        self._batch = batch
        self._steps = steps
        self._seed = seed

    @property
    def distinct_steps(self) -> int:
        """Steps after which the batches repeat, or all of them if none does."""
        if self._seed is not None:
            return self._steps
        return min(self._steps, self._n // gcd(self._n, self._batch))

    def first(self, steps: int) -> Ints:
        """Example indices of the first ``steps`` steps, ``[steps * batch]``."""
        wanted = steps * self._batch
        if self._seed is None:
            return np.arange(wanted) % self._n
        if steps > self._steps:
            return _shuffled_epochs(self._n, self._seed, wanted).astype(np.int64)
        return self._shuffled[:wanted].astype(np.int64)

    @cached_property
    def used(self) -> Ints:
        """Examples that some step takes, ascending."""
        return np.flatnonzero(self.times_used)

    @cached_property
    def times_used(self) -> Ints:
        """How often each example is taken, ``[n]``."""
        whole, rest = divmod(self._steps * self._batch, self._n)
        times = np.full(self._n, whole)
        if rest:
            times[np.arange(rest) if self._seed is None else self._shuffled[-rest:]] += 1
        return times

    def of(self, steps: int | Ints) -> Ints:
        """Example indices of a step, ``[batch]``; of several in rows."""
        places = np.asarray(steps)[..., None] * self._batch + np.arange(self._batch)
        if self._seed is None:
            return np.asarray(places % self._n)
        return self._shuffled[places].astype(np.int64)

    @cached_property
    def _shuffled(self) -> NDArray[Any]:
        assert self._seed is not None
        return _shuffled_epochs(self._n, self._seed, self._steps * self._batch)


@lru_cache(maxsize=64)
def step_order(n: int, batch: int, steps: int, seed: int | None) -> StepOrder:
    """The order of a task's steps; tasks with the same numbers share it."""
    return StepOrder(n, batch, steps, seed)


def _shuffled_epochs(n: int, seed: int, wanted: int) -> NDArray[Any]:
    """The first ``wanted`` indices, as small as they can be: a long run has many."""
    whole_epochs = -(-wanted // n)
    indices = np.empty((whole_epochs, n), dtype=np.min_scalar_type(n))
    for epoch, order in enumerate(islice(epoch_orders(n, seed, shuffle=True), whole_epochs)):
        indices[epoch] = order
    return indices.reshape(-1)[:wanted]
