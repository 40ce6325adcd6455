"""LoRAFusion: groups of adapters whose sequences are packed into micro-batches under a token capacity.

LoRAFusion (Zhu et al., EuroSys'26, arXiv 2510.00206) shares one backbone as follows.

* **Groups.** Adapters are sorted by mean length, and the longest is paired with the shortest, the second
  longest with the second shortest, and so on, so that groups are alike.
* **Capacity.** The sequences of a group's step, whoever owns them, are packed into as few micro-batches as a
  token capacity allows. The capacity is found by trial.
* **Bubble rule.** Groups follow one another. With ``pp`` stages, at least ``pp - 1`` micro-batches of others
  lie between the last one of a group's step and the first one of its next step: then the optimizer's step is
  done in time, and the pipeline has no bubble. Adapters are only paired while the rule holds.

What is different here, never to its disadvantage, is in ``docs/policies.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from muxtune.batches import HTaskShape, largest_stream, phase_tokens, phases
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, PlanStructure
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.meshes import choose_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order
from muxtune.policies.base import POLICIES
from muxtune.policies.shared import refuse_partition
from muxtune.support.errors import SpecError

CAPACITIES = 6
"""Token capacities tried: the smallest power of two that no micro-batch needs more than, and its halves."""

TaskGroup = tuple[str, ...]
Counts = Callable[[TaskGroup], int]
"""Micro-batches of a group per step, on each replica."""


@POLICIES.register("lorafusion")
class LoraFusion:
    """Head-tail groups of adapters, token-capped micro-batches, a bubble rule."""

    summary = "LoRAFusion: length-paired groups of tasks, micro-batches packed under a token capacity"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure for every mesh, capacity and depth of grouping."""
        refuse_partition(options, "lorafusion")
        if options.alignment not in {None, "pack"} or options.chunk_tokens is not None:
            asked = options.alignment if options.chunk_tokens is None else "chunk"
            raise SpecError("--alignment", asked, "pack: lorafusion packs micro-batches")
        if (options.carry or 1) > 1:
            raise SpecError("--carry", options.carry, "nothing: lorafusion cuts no sequences")
        packer = Packer(problem)
        return on_every_mesh(problem, options, lambda fixed: _structures(problem, fixed, packer))


class Packer:
    """Packs the sequences of groups under a token capacity; the same question is answered once.

    Args:
        problem: Has the tasks' data.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self._fullest = lru_cache(maxsize=None)(self._measure_fullest)
        self._choice = lru_cache(maxsize=None)(self._with_microbatches)

    def pack(self, group: TaskGroup, capacity_tokens: int, dp: int) -> HTaskChoice:
        """The group as an hTask with as few micro-batches as capacity and declared sizes allow.

        Args:
            group: Task ids.
            capacity_tokens: Tokens of a micro-batch, at most; at least those of the longest sequence.
            dp: Replicas that share each step.
        """
        microbatches = self._problem.shape(group, "pack", dp=dp).microbatches
        while True:
            choice = self._choice(group, microbatches, dp)
            if choice.shape.tokens <= capacity_tokens:
                return choice
            # However it is dealt, the fullest step would not fit into fewer.
            fewest = -(-self._fullest(group) // (capacity_tokens * dp))
            microbatches = max(microbatches + 1, fewest)

    def _with_microbatches(self, group: TaskGroup, microbatches: int, dp: int) -> HTaskChoice:
        members = [self._problem.data[task_id] for task_id in group]
        sizes = [self._problem.group_tokens(task_id, "pack", microbatches * dp, None) for task_id in group]
        shape = HTaskShape(
            alignment="pack",
            row_tokens=None,
            microbatches=microbatches,
            replicas=dp,
            tokens=phase_tokens(members, sizes, "pack", phases(members)[0]),
        )
        return HTaskChoice(task_ids=group, shape=shape)

    def _measure_fullest(self, group: TaskGroup) -> int:
        """Tokens of the fullest step in which the whole group trains."""
        sizes = [self._problem.group_tokens(task_id, "pack", 1, None) for task_id in group]
        steps = min(self._problem.data[task_id].task.steps for task_id in group)
        return largest_stream(sizes, range(steps))


def capacities(problem: PlanningProblem, dp: int) -> list[int]:
    """Token capacities to try, descending; each holds the longest sequence."""
    needed = problem.shape(tuple(problem.data), "pack", dp=dp).tokens
    largest = 1 << (needed - 1).bit_length()
    longest = problem.longest_sequence(tuple(problem.data))
    # A stream is rounded up, and the longest sequence may lie alone in it.
    return [c for c in (largest >> i for i in range(CAPACITIES)) if c >= longest]


def mean_length(problem: PlanningProblem, task_id: str) -> float:
    """Mean length of a task's sequences in tokens."""
    return problem.data[task_id].mean_length


def obeys_bubble_rule(microbatches: Sequence[int], pp: int) -> bool:
    """Whether ``pp - 1`` micro-batches of others lie between any group's steps.

    Args:
        microbatches: Micro-batches per group and step.
        pp: Pipeline stages.
    """
    return sum(microbatches) - max(microbatches) >= pp - 1


def head_tail_groupings(problem: PlanningProblem, counts: Counts, pp: int) -> list[list[TaskGroup]]:
    """Single tasks, pairs, pairs of pairs and so on, as far as the bubble rule lets it.

    The paper stops at pairs. Here a micro-batch also keeps to the micro-batch sizes that its tasks declare,
    so a pair alone may not fill the capacity, and pairs are paired again.

    Args:
        problem: Has the tasks.
        counts: Micro-batches of a group.
        pp: Pipeline stages.

    Returns:
        Groupings; only single tasks where even these are too few for the rule.
    """
    groupings: list[list[TaskGroup]] = [[(task_id,) for task_id in problem.data]]
    if not obeys_bubble_rule([counts(group) for group in groupings[0]], pp):
        return groupings
    while True:
        paired = _pair(problem, groupings[-1], counts, pp)
        if len(paired) == len(groupings[-1]):
            return groupings
        groupings.append(paired)


def _pair(problem: PlanningProblem, groups: Sequence[TaskGroup], counts: Counts, pp: int) -> list[TaskGroup]:
    """The longest group with the shortest, from both ends; a pair is only made if the rule still holds.

    Where it does not, the one with more micro-batches stays alone, as in the paper.
    """

    def length(group: TaskGroup) -> float:
        return float(np.mean([mean_length(problem, task_id) for task_id in group]))

    ordered = sorted(groups, key=lambda group: (-length(group), group))
    sizes = [counts(group) for group in ordered]
    done: list[TaskGroup] = []
    done_sizes: list[int] = []
    head, tail = 0, len(ordered) - 1
    while head < tail:
        pair = ordered[head] + ordered[tail]
        if obeys_bubble_rule([*done_sizes, counts(pair), *sizes[head + 1 : tail]], pp):
            done.append(pair)
            head, tail = head + 1, tail - 1
        elif sizes[head] < sizes[tail]:
            done.append(ordered[tail])
            tail -= 1
        else:
            done.append(ordered[head])
            head += 1
        done_sizes.append(counts(done[-1]))
    return done + ordered[head : tail + 1]


def _structures(problem: PlanningProblem, options: PlanOptions, packer: Packer) -> list[PlanStructure]:
    """All capacities and groupings on one mesh, without repetitions."""
    dp = options.dp or 1
    found: dict[tuple[HTaskChoice, ...], PlanStructure] = {}
    for capacity in capacities(problem, dp):

        def packed(group: TaskGroup, capacity: int = capacity) -> HTaskChoice:
            return packer.pack(group, capacity, dp)

        pp = options.pp or 1
        for groups in head_tail_groupings(problem, lambda g: packed(g).shape.microbatches, pp):
            htasks = tuple(packed(group) for group in groups)
            if htasks not in found:
                mesh = choose_mesh(problem, htasks, options)
                found[htasks] = in_order(htasks, mesh, options.template or "continuous")
    return list(found.values())
