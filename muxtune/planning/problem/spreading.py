"""Long micro-batches spread over more of them than their tasks declare.

What :mod:`muxtune.planning.problem.carrying` does to micro-batches of one long sequence, this does to those
of several: each sequence stays whole, and a micro-batch has fewer of them. Nobody gets more sequences at once
than declared, and nothing is read again or has to stay together in the pipeline. The work of a stage grows a
little, as operators get smaller, so it pays where stages wait for long micro-batches.

Who is spread follows from a length that no micro-batch exceeds, as far as its sequences allow: powers of two,
from the longest micro-batch down. How many micro-batches that takes depends on how sequences can be packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.problem.problem import PlanningProblem


def may_spread(options: PlanOptions) -> bool:
    """Whether the number of micro-batches is left to the search; they are packed."""
    fixed = options.carry is not None or options.chunk_tokens is not None
    return not fixed and options.alignment in {None, "pack"} and "chunking" not in options.without


def spread_choice(problem: PlanningProblem, htask: HTaskChoice, dp: int, most_tokens: int) -> HTaskChoice:
    """The hTask packed into the fewest micro-batches that are no longer than this, or as near as possible.

    Args:
        problem: The planning problem.
        htask: The hTask as it is otherwise; it stays so where no packed micro-batch would be shorter.
        dp: Replicas.
        most_tokens: Tokens of a micro-batch.
    """
    task_ids = htask.task_ids
    declared = problem.shape(task_ids, "pack", dp=dp).microbatches
    sequences = max(problem.data[task_id].task.global_batch_size for task_id in task_ids) // dp
    most = min(sequences, problem.settings.most_spread * declared)
    in_one = problem.shape(task_ids, "pack", dp=dp, microbatches=1).tokens
    best, microbatches = htask, declared
    while best.shape.tokens > most_tokens:
        # However it is dealt, a step would not fit into fewer.
        microbatches = max(microbatches + 1, in_one // max(most_tokens, 1))
        if microbatches > most:
            break
        shape = problem.shape(task_ids, "pack", dp=dp, microbatches=microbatches)
        if shape.tokens < best.shape.tokens:
            best = HTaskChoice(task_ids=task_ids, shape=shape, instance=htask.instance)
    return best


def spread_variants(
    problem: PlanningProblem, htasks: Sequence[HTaskChoice], mesh: Mesh
) -> Iterator[tuple[HTaskChoice, ...]]:
    """The partition with long micro-batches spread, for every length at which something is; none twice.

    Args:
        problem: The planning problem.
        htasks: The partition; carry groups are packed instead, where that makes their micro-batches as short.
        mesh: The mesh.
    """
    if mesh.pp == 1:
        return
    whole = tuple(_whole(problem, htask, mesh) for htask in htasks)
    longest = 1 << (max(htask.shape.tokens for htask in whole) - 1).bit_length()
    known = {tuple(htasks), whole}
    for halved in range(1, problem.settings.spreads + 1):
        most_tokens = longest >> halved
        variant = tuple(
            _or_cut(spread_choice(problem, each, mesh.dp, most_tokens), as_it_is, most_tokens)
            for each, as_it_is in zip(whole, htasks, strict=True)
        )
        if variant not in known:
            known.add(variant)
            yield variant


def _or_cut(spread: HTaskChoice, as_it_is: HTaskChoice, most_tokens: int) -> HTaskChoice:
    """The spread hTask; if it stays too long, and is in shorter carry groups now, as it is."""
    cut = as_it_is.shape.carry > 1 and most_tokens < spread.shape.tokens > as_it_is.shape.tokens
    return as_it_is if cut else spread


def _whole(problem: PlanningProblem, htask: HTaskChoice, mesh: Mesh) -> HTaskChoice:
    if htask.shape.carry == 1:
        return htask
    shape = problem.shape(htask.task_ids, "pack", dp=mesh.dp)
    return HTaskChoice(task_ids=htask.task_ids, shape=shape, instance=htask.instance)
