"""Refinement of partitions: what contiguity in one order of the tasks costs, local search takes back.

Tasks differ in more than the tokens of their micro-batches, so no single order has all good groups next to
each other; above all, fusing tasks that declare different numbers of micro-batches is expensive (``m(H)`` is
the largest), and pays only sometimes. Therefore

1. dynamic programming cuts several orders of the tasks, into every number of groups;
2. from the best of these, groups change step by step: a task moves to another group or into one of its own,
   two tasks change places, two groups become one, a group is split. Each step takes the neighbour with the
   least bound (:meth:`muxtune.planning.refinement.groups.GroupTable.bound_s`) until none is less;
3. the partitions that were met are appraised by ascending bound, and then the neighbours of the fastest one
   and of the one with the least bound, until some rounds have found nothing faster. Where memory is short,
   the best partition is often next to one that would be faster and does not fit.

What is met but cannot be better than the best schedule so far is not played. Everything is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from muxtune.peft import mixed_size
from muxtune.planning.decisions.partition_dp import Groups, cheapest_cuts
from muxtune.planning.decisions.settings import Effort
from muxtune.planning.refinement.appraiser import Appraised, Appraiser
from muxtune.planning.refinement.groups import GroupTable
from muxtune.tasks import TaskData

THOROUGH = Effort(orders=7, starts=8, neighbours=512, new_groups=1024, appraisals=32, rounds=8)
"""Effort for some ten tasks: all neighbours may be priced."""
BRIEF = Effort(orders=2, starts=2, neighbours=24, new_groups=1024, appraisals=16, rounds=2)
"""Effort for many tasks, whose groups repeat themselves: a step more or less changes little."""

MANY_TASKS = 12
"""Number of tasks from which a refinement is brief unless it is told otherwise."""


def refined_partitions(
    appraiser: Appraiser, effort: Effort | None = None, *, starts: Sequence[Groups] | None = None
) -> list[Appraised]:
    """All partitions whose schedules were played and fit the memory, fastest first.

    Args:
        appraiser: Appraiser of the problem.
        effort: Limits; by the number of tasks if absent.
        starts: Partitions to start from; those of :func:`dp_starts` if absent.
    """
    return _Refinement(appraiser, effort).run(starts)


def default_effort(tasks: int) -> Effort:
    """What a number of tasks allows."""
    return THOROUGH if tasks < MANY_TASKS else BRIEF


def dp_starts(table: GroupTable, orders: int) -> list[Groups]:
    """Best contiguous partitions for every number of groups, in several orders; and every task by itself."""
    starts: dict[Groups, None] = {}  # a set that keeps the order
    for order in task_orders(table)[:orders]:
        cuts = cheapest_cuts(_contiguous_costs(table, order), len(order))
        for count in np.flatnonzero(np.isfinite(cuts.total)).tolist():
            ends_and_widths = zip(*(each.tolist() for each in cuts.places(count)), strict=True)
            masks = (sum(1 << bit for bit in order[end - w : end + 1]) for end, w in ends_and_widths)
            starts[tuple(sorted(masks))] = None
    starts[tuple(1 << bit for bit in range(len(table.task_ids)))] = None
    return list(starts)


def _contiguous_costs(table: GroupTable, order: Sequence[int]) -> NDArray[np.float64]:
    """``[n, W]``, a band with the seconds of every group of neighbours in the order."""
    count = len(order)
    declared = [table.problem.data[table.task_ids[bit]].task.declared_microbatches for bit in order]
    cost_s = np.full((count, count), np.inf)
    for start in range(count):
        mask = 0
        for end in range(start, count):
            mask |= 1 << order[end]
            if not table.may_share(mask):
                break
            if not table.exceeds_alone(mask):
                cost_s[end, end - start] = table[mask].cost_s
            elif max(declared[start : end + 1]) == max(declared[start:]):
                break  # more tasks in no more micro-batches need more memory still
    return cost_s


def task_orders(table: GroupTable) -> list[tuple[int, ...]]:
    """Different orders of the tasks, as positions in ``table.task_ids``; the one by tokens comes first."""
    data = [table.problem.data[task_id] for task_id in table.task_ids]
    model = table.problem.model
    keys: list[Callable[[TaskData], tuple[float, ...]]] = [
        lambda _: (),  # the table's own: tokens of a micro-batch
        lambda d: (d.task.declared_microbatches,),
        lambda d: (_step_tokens(d),),
        lambda d: (d.task.row_tokens,),
        lambda d: (d.task.micro_batch_size,),
        lambda d: (d.task.declared_microbatches, mixed_size(d.task.peft, model)),
        lambda d: (mixed_size(d.task.peft, model),),
    ]
    orders = (
        tuple(sorted(range(len(data)), key=lambda bit: (table.methods[bit], *key(data[bit]), bit)))
        for key in keys
    )
    return list(dict.fromkeys(orders))


def _step_tokens(data: TaskData) -> float:
    """Tokens of an optimizer step."""
    return data.step_tokens


class _Refinement:
    """A refinement under way."""

    def __init__(self, appraiser: Appraiser, effort: Effort | None) -> None:
        self.met: dict[Groups, float] = {}
        """Every partition that was priced, with its bound in seconds; infinite where it cannot fit."""
        self._appraiser = appraiser
        self._table = appraiser.table.blank()  # estimates and effort follow from this refinement alone
        self._effort = effort or default_effort(len(self._table.task_ids))
        self._found: dict[Groups, Appraised | None] = {}
        self._expanded: set[Groups] = set()
        self._best_s = math.inf
        self._groups_left = self._effort.new_groups
        self._orders = task_orders(self._table)

    def run(self, starts: Sequence[Groups] | None) -> list[Appraised]:
        """Partitions that fit, fastest first."""
        ranked = sorted(starts or dp_starts(self._table, self._effort.orders), key=self._by_bound)
        self._estimate = CostEstimate(self._table)
        for start in ranked[: self._effort.starts]:
            self._descend(start, self._by_bound)
        self._appraise(sorted(self.met, key=self._by_bound))
        if not self._fits:  # what is fast needs too much memory
            for key in (self._by_memory, self._by_least_memory):
                self._descend(min(self.met, key=key), key)
                self._appraise(sorted(self.met, key=key))
        in_vain = 0
        while in_vain < self._effort.rounds:
            around = {groups for centre in self._centres() for groups in self._neighbours(centre)}
            improved = self._appraise(sorted(around, key=self._by_bound if self._fits else self._by_memory))
            in_vain = 0 if improved else in_vain + 1
        return sorted(self._fitting(), key=lambda each: (each.seconds, each.groups))

    @property
    def _fits(self) -> bool:
        """Whether a partition was found that fits."""
        return self._best_s < math.inf

    def _centres(self) -> list[Groups]:
        """Partitions whose neighbours come next: the fastest that fits, and the least bound, fit or not.

        While nothing fits, those that may need least memory.
        """
        fresh = [groups for groups in self.met if groups not in self._expanded]
        if not self._fits:
            keys = (self._by_memory, self._by_least_memory)
            return list(dict.fromkeys(min(fresh, key=key) for key in keys if fresh))
        fitting = [each for each in self._fitting() if each.groups not in self._expanded]
        fastest = sorted(fitting, key=lambda each: (each.seconds, each.groups))[:1]
        least = sorted(fresh, key=self._by_bound)[:1]
        return list(dict.fromkeys([*(each.groups for each in fastest), *least]))

    def _fitting(self) -> list[Appraised]:
        return [each for each in self._found.values() if each is not None]

    def _by_bound(self, groups: Groups) -> tuple[float, Groups]:
        return self._bound_s(groups), groups

    def _by_memory(self, groups: Groups) -> tuple[float, Groups]:
        return self._table.needed_bytes(groups), groups

    def _by_least_memory(self, groups: Groups) -> tuple[float, Groups]:
        return self._table.least_bytes(groups), groups

    def _bound_s(self, groups: Groups) -> float:
        if groups not in self.met:
            self._groups_left -= sum(mask not in self._table for mask in groups)
            self._table.htasks(groups)  # works them out
            exceeds = self._appraiser.surely_exceeds(groups)
            self.met[groups] = math.inf if exceeds else self._appraiser.bound_s(groups)
        return self.met[groups]

    def _descend(self, start: Groups, key: Callable[[Groups], tuple[float, Groups]]) -> None:
        """Step to the least neighbour until none is less."""
        here = start
        while True:
            least = min(self._neighbours(here), key=key, default=here)
            if key(least)[0] >= key(here)[0]:
                return
            here = least

    def _appraise(self, ordered: Sequence[Groups]) -> bool:
        """Play what may be better than the best so far; whether something is."""
        before_s = self._best_s
        in_vain = 0
        for groups in ordered:
            if in_vain == self._effort.appraisals:
                break
            if groups in self._found or self._bound_s(groups) >= self._best_s:
                continue
            played = self._appraiser.appraisals
            found = self._found[groups] = self._appraiser.appraise(groups)
            in_vain += self._appraiser.appraisals - played
            if found is not None and found.seconds < self._best_s:
                self._best_s, in_vain = found.seconds, 0
        return self._best_s < before_s

    def _neighbours(self, groups: Groups) -> list[Groups]:
        """Neighbours with the least estimates, as many as the effort allows."""
        self._expanded.add(groups)
        estimates = {mask: self._estimate(mask) for mask in groups}
        total_s = sum(estimates.values())
        ranked: dict[Groups, float] = {}
        for old, new in steps(groups, self._orders):
            if not all(map(self._table.may_share, new)):
                continue
            changed = tuple(sorted([*(mask for mask in groups if mask not in old), *new]))
            if changed not in ranked:
                gone_s = sum(estimates[mask] for mask in old)
                ranked[changed] = total_s - gone_s + sum(self._estimate(mask) for mask in new)
        chosen = sorted(ranked, key=lambda changed: (ranked[changed], changed))[: self._effort.neighbours]
        for changed in chosen:
            if self._groups_left > 0:
                self._bound_s(changed)
        return [changed for changed in chosen if changed in self.met]


def steps(groups: Groups, orders: Sequence[Sequence[int]]) -> Iterator[tuple[Groups, Groups]]:
    """Ways to change a partition, as the groups that go and those that come; some come twice.

    Args:
        groups: The partition.
        orders: Orders of the tasks; groups are split where they are cut in one of them.
    """
    bits = {mask: [1 << b for b in range(mask.bit_length()) if mask >> b & 1] for mask in groups}
    for mask in groups:
        for bit in bits[mask]:
            if bit == mask:
                continue  # a whole group moves below, as one of two that become one
            yield (mask,), (bit, mask ^ bit)
            for other in groups:
                if other != mask:
                    yield (mask, other), (mask ^ bit, other | bit)
        for order in orders:
            front = 0
            for position in order:
                front |= mask & 1 << position
                if front not in {0, mask}:
                    yield (mask,), (front, mask ^ front)
    for one, other in combinations(groups, 2):
        yield (one, other), (one | other,)
        for a in bits[one]:
            for b in bits[other]:
                if (a, b) != (one, other):  # two tasks by themselves would only exchange their names
                    yield (one, other), (one ^ a | b, other ^ b | a)


class CostEstimate:
    """Cost of a group before it is priced: its tokens on the curve of the groups that are priced.

    Args:
        table: Table with some groups priced.
    """

    def __init__(self, table: GroupTable) -> None:
        self._table = table
        self._data = [table.problem.data[task_id] for task_id in table.task_ids]
        self._mean_tokens = [data.mean_length for data in self._data]
        curve: dict[float, list[float]] = {}
        for mask in table.masks():
            tokens = self._tokens(mask, table[mask].microbatches)
            curve.setdefault(tokens, []).append(table[mask].slowest_s)
        self._curve_tokens = sorted(curve)
        self._curve_s = [sum(curve[tokens]) / len(curve[tokens]) for tokens in self._curve_tokens]

    def __call__(self, mask: int) -> float:
        """Seconds of an iteration on the slowest stage."""
        if mask in self._table:
            return self._table[mask].cost_s
        replicas = self._table.mesh.dp
        declared = max(self._data[bit].task.declared_microbatches for bit in _bits(mask))
        m = -(-declared // replicas)
        return m * float(np.interp(self._tokens(mask, m), self._curve_tokens, self._curve_s))

    def _tokens(self, mask: int, microbatches: int) -> float:
        """Tokens of a micro-batch, about."""
        groups = microbatches * self._table.mesh.dp
        return sum(
            -(-self._data[bit].task.global_batch_size // groups) * self._mean_tokens[bit]
            for bit in _bits(mask)
        )


def _bits(mask: int) -> list[int]:
    """Positions of the set bits."""
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
