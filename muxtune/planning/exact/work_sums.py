"""Micro-batches added up, so that those of a replica, a step or all steps have a mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.peft import Specs


@dataclass(frozen=True)
class WorkSum:
    """Sum of some micro-batches of one hTask."""

    count: int
    tokens: int
    """Tokens of the stream, the same in each."""
    pefts: Specs
    task_tokens: tuple[int, ...]
    calls: Counter[tuple[int, int]]
    """Calls of attention, by sequences and length."""
    carried_calls: Counter[tuple[int, int, int]]
    """Calls that attend to carried keys, by sequences, queries and keys."""
    targets: float
    left_tokens: float

    @classmethod
    def of_works(cls, works: Sequence[MicrobatchWork]) -> WorkSum:
        """Add up micro-batches whose calls each run once."""
        return cls(
            count=len(works),
            tokens=works[0].tokens,
            pefts=works[0].pefts,
            task_tokens=_added(work.task_tokens for work in works),
            calls=Counter(call[1:] for work in works for call in work.attention),
            carried_calls=Counter(call[1:] for work in works for call in work.carried_attention),
            targets=sum(work.targets for work in works),
            left_tokens=sum(work.left_tokens for work in works),
        )

    @classmethod
    def of_all(cls, sums: Iterable[WorkSum]) -> WorkSum:
        """Add up sums, at least one."""
        first, *others = sums
        if not others:
            return first
        every = (first, *others)
        return cls(
            count=sum(each.count for each in every),
            tokens=first.tokens,
            pefts=first.pefts,
            task_tokens=_added(each.task_tokens for each in every),
            calls=_counted(each.calls for each in every),
            carried_calls=_counted(each.carried_calls for each in every),
            targets=sum(each.targets for each in every),
            left_tokens=sum(each.left_tokens for each in every),
        )

    @cached_property
    def mean(self) -> MicrobatchWork:
        """Average micro-batch."""
        share = 1 / self.count
        return MicrobatchWork(
            tokens=self.tokens,
            task_tokens=tuple(round(tokens / self.count) for tokens in self.task_tokens),
            pefts=self.pefts,
            attention=tuple((n * share, *call) for call, n in sorted(self.calls.items())),
            targets=share * self.targets,
            carried_attention=tuple((n * share, *call) for call, n in sorted(self.carried_calls.items())),
            left_tokens=share * self.left_tokens,
        )


def _added(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))


_Call = TypeVar("_Call")


def _counted(counters: Iterable[Counter[_Call]]) -> Counter[_Call]:
    total: Counter[_Call] = Counter()
    for each in counters:
        total.update(each)
    return total
