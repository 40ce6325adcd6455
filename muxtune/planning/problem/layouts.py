"""Layouts of a group of tasks (alignment, chunk length, carry groups), and the cheapest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from muxtune.batches import ROW_MULTIPLE
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError


def sort_by_tokens(problem: PlanningProblem) -> list[str]:
    """Task ids by tokens per micro-batch of the task alone, packed; ties in the order of the workload."""
    return sorted(problem.data, key=lambda task_id: problem.shape((task_id,), "pack").tokens)


def cheapest_alignment(
    problem: PlanningProblem, mesh: Mesh, options: PlanOptions
) -> Callable[[tuple[str, ...]], HTaskChoice]:
    """A function that gives a group the alignment with the least time on the slowest stage.

    Args:
        problem: The planning problem.
        mesh: The mesh.
        options: May fix the alignment, the chunk length and the carry groups.
    """

    def align(task_ids: tuple[str, ...]) -> HTaskChoice:
        return cheapest_layout(problem, mesh, task_ids, alignment_candidates(problem, task_ids, options))

    return align


def shortest_alignment(
    problem: PlanningProblem, mesh: Mesh, options: PlanOptions
) -> Callable[[tuple[str, ...]], HTaskChoice]:
    """As :func:`cheapest_alignment`, with the fewest tokens, for where memory is short."""

    def align(task_ids: tuple[str, ...]) -> HTaskChoice:
        shapes = [
            problem.shape(task_ids, *layout, dp=mesh.dp)
            for layout in alignment_candidates(problem, task_ids, options)
        ]
        return HTaskChoice(task_ids=task_ids, shape=min(shapes, key=lambda shape: shape.tokens))

    return align


def cheapest_layout(
    problem: PlanningProblem, mesh: Mesh, task_ids: tuple[str, ...], wanted: Iterable[Layout]
) -> HTaskChoice:
    """The group under the layout with the least time on the slowest stage; all have as many micro-batches."""
    return cheapest_choice(
        problem,
        mesh,
        [
            HTaskChoice(task_ids=task_ids, shape=problem.shape(task_ids, *layout, dp=mesh.dp))
            for layout in wanted
        ],
    )


def cheapest_choice(problem: PlanningProblem, mesh: Mesh, choices: Sequence[HTaskChoice]) -> HTaskChoice:
    """A group in the layout with the least time on the slowest stage, unless it is far longer."""
    shortest = min(choice.shape.tokens for choice in choices)
    worth = [c for c in choices if c.shape.tokens <= problem.settings.most_padding * shortest]
    return min(worth, key=lambda c: problem.htask_times(c, mesh).slowest_s)


def packed_or_in_chunks(problem: PlanningProblem, mesh: Mesh, htask: HTaskChoice) -> HTaskChoice:
    """A packed hTask, or the same in the shortest chunks, where these hold no more tokens and are faster.

    They never hold fewer, but may share more calls of attention.
    """
    if htask.layout.alignment != "pack":
        return htask
    length = 1 << (problem.longest_sequence(htask.task_ids) - 1).bit_length()
    shape = problem.shape(htask.task_ids, "chunk", length, dp=mesh.dp)
    if shape.tokens > htask.shape.tokens or shape.microbatches != htask.shape.microbatches:
        return htask
    return cheapest_choice(problem, mesh, [htask, HTaskChoice(task_ids=htask.task_ids, shape=shape)])


def alignment_candidates(
    problem: PlanningProblem, task_ids: Sequence[str], options: PlanOptions
) -> list[Layout]:
    """Alignments that are worth pricing, with their chunk lengths; all have the carry groups asked for.

    Without ``--carry`` every sequence lies in one micro-batch; see :mod:`muxtune.planning.problem.carrying`
    for more.

    Raises:
        SpecError: A chunk length or carry groups are given for another alignment.
    """
    alignment, chunk_tokens, carry = options.alignment, options.chunk_tokens, options.carry or 1
    asked = ("--chunk-tokens", chunk_tokens) if chunk_tokens is not None else ("--carry", carry)
    if carry < 1 or carry & (carry - 1):
        raise SpecError("--carry", carry, "a power of two")
    if chunk_tokens is not None or carry > 1:
        if alignment not in {None, "chunk"}:
            raise SpecError(*asked, f"nothing: the alignment is {alignment}")
        alignment = "chunk"
    if chunk_tokens is not None:
        return [Layout("chunk", chunk_tokens, carry)]
    longest = problem.longest_sequence(task_ids)
    more = problem.settings.chunk_candidates
    if carry > 1:
        return carried_layouts(problem, task_ids, carry)
    candidates: list[Layout] = []
    if alignment in {None, "chunk"}:
        smallest = 1 << (longest - 1).bit_length()
        lengths = {smallest << i for i in range(more)}
        if alignment == "chunk":  # beside pack, which never holds more, shorter ones are no use
            lengths |= {max(smallest >> i, ROW_MULTIPLE) for i in range(1, more + 1)}
        candidates += [Layout("chunk", length) for length in sorted(lengths)]
    if alignment in {None, "pack"}:
        candidates.append(Layout("pack"))
    if alignment in {None, "pad"}:
        candidates.append(Layout("pad"))
    return candidates


def carried_layouts(problem: PlanningProblem, task_ids: Sequence[str], carry: int) -> list[Layout]:
    """Chunks that cut the longest sequence of a group over ``carry`` micro-batches, the longest chunk first.

    Of lengths that cost the same the first is taken, which has fewer chunks to lay out.
    """
    longest, lengths = problem.longest_sequence(task_ids), problem.settings.carried_chunks
    lengths = tuple(length for length in lengths if length * carry <= longest) or lengths[:1]
    return [Layout("chunk", length, carry) for length in sorted(lengths, reverse=True)]
