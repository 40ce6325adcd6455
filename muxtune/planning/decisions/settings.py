"""Everything that is tuned in the search, in one place.

No value here changes what a plan means or what it costs; each says how far the search looks. ``python -m
benchmarks.search_ablation`` measures what a stage of the search buys by replacing these one after the other.

Estimates, guesses and bounds are explained in ``docs/planning.md``. *In front* means: with the least guess at
the iteration; *the best* is the fastest schedule so far that fits the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.orchestration import Mode
from muxtune.schedule import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long a local search over partitions may go on."""

    orders: int
    """Orders of the tasks that dynamic programming cuts."""
    starts: int
    """Partitions that local search starts from, the best that dynamic programming finds."""
    neighbours: int
    """Neighbours of a partition that are priced in a step: those with the least estimates."""
    new_groups: int
    """Groups that local search may price; dynamic programming prices its own."""
    appraisals: int
    """Partitions in a row, of a round, whose schedules are played without finding a faster one."""
    rounds: int
    """Rounds in a row around the best partitions without finding a faster one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How far the search looks."""

    # Which partitions there are

    all_partitions_up_to: int = 10
    """Tasks up to which all partitions are ranked: ten have 115975, of 1023 groups; eleven would have 678570.
    Of ten, contiguous groups alone were 1 to 3 % slower, and refining those took six times as long."""
    orders: tuple[str, ...] = ("declared", "tokens")
    """With more tasks, orders in which contiguous groups are cut: by declared micro-batches, and by tokens of
    a micro-batch. Without the first, 13 plans were 1 % slower in the median and 11 % at worst; without the
    second, 5 % at worst."""
    second_order_within: float = 1.2
    """Meshes on which the second order is cut, too: their least guess is at most this many times the best."""
    ranked_by_load: int = 8192
    """Partitions of a mesh that are ranked: of more, those with the least work on the busiest stage, and as
    many that surely fit the memory. Eight tasks have 4140."""
    widest_group: int = 256
    """Most tasks of an hTask where there are more than twice as many; a cap for time, which no bound
    justifies."""
    most_counts: int = 96
    """Numbers of groups that dynamic programming cuts into; with more tasks, the paces find partitions into
    more."""
    give_up: float = 1.5
    """Partitions into more groups are not looked for once the best costs so many times the cheapest."""
    paces: int = 24
    """Paces of the pipeline that partitions are cut for, in a geometric series from the slowest task alone to
    the slowest group."""

    patience_of_others: int = 24
    """Patience per mesh, or of all with more tasks, for objectives that nothing estimates or bounds."""

    # Layouts

    chunk_candidates: int = 3
    """Chunk lengths tried per group: the smallest power of two that holds every sequence, and its doublings;
    if there is no alignment but chunks, as many halves of it too."""
    near: float = 1.06
    """Ratio of the estimates of two alignments of a group up to which exact prices decide between them."""
    most_padding: float = 1.5
    """Layouts with more than this many times the tokens of the shortest one are not priced: fewer calls of
    attention never make up for so many more tokens."""
    carries: tuple[int, ...] = (1, 2, 4)
    """Micro-batches over which the sequences of one may be cut."""
    carried_chunks: tuple[int, ...] = (16, 64)
    """Chunk lengths tried where sequences are cut. What attention reads again depends on where micro-batches
    end, and not on the chunk, so short ones lose least."""
    cuts: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    """Paces to which micro-batches are cut: the longest micro-batch over each of these."""
    cuts_of_tasks: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Such paces before partitions are known: the longest micro-batch of a single task over each. Fused with
    tasks that have more micro-batches, its own are shorter, and so are the paces of its partition."""
    least_cut_tokens: int = 64
    """Tokens that a micro-batch must have after it is cut; with fewer, it is launches and messages alone."""
    worth_cutting: float = 0.98
    """Micro-batches are cut on a mesh only if the least work that any partition has on its busiest stage is
    below this share of the best iteration that is expected without cutting."""
    spreads: int = 3
    """Lengths to which long micro-batches are spread: a power of two above the longest one, halved so many
    times."""
    most_spread: int = 4
    """Micro-batches that an hTask is spread over, as a multiple of those that its tasks declare."""
    spread_within: float = 1.3
    """Partitions are spread if they took at most this many times the best. Spreading took up to 13 % off."""
    spread_partitions: int = 2
    """Partitions of a mesh that are spread."""
    most_ordered: int = 5
    """HTasks up to which all orders of injection are played for partitions that are spread: 24 for five."""
    cut_freely: int = 64
    """With more tasks than this, micro-batches are cut only where a single task's are among the longest."""
    paced_by_one: float = 0.7
    """A single task's micro-batch is among the longest if it takes more than this share of the longest one's
    time."""

    # Estimates and guesses

    sampled_steps: int = 16
    """Optimizer steps whose sequences are looked at, of the shortest and of the longest task."""
    curve_points: int = 24
    """Sizes at which the price of an operator is asked for; in between, straight lines."""
    uneven: float = 0.4
    """Share of the difference between the longest micro-batch and the shortest that each further stage is
    expected to wait for; seen between 0.25 and 0.65 where schedules were played."""
    overlapped: float = 0.6
    """Share that overlap is expected to hide of what it could hide inside of a stage at most."""
    within: float = 1.2
    """Partitions of few tasks become proposals if their guess is at most this many times the least of all
    meshes."""
    roughly_within: float = 1.4
    """Factor as ``within``, for the first partitions of a mesh if any is within that: guesses at waiting may
    be off by a fifth."""
    roughly_first: int = 8
    """Partitions in front on a mesh that ``roughly_within`` is for."""
    per_mesh: int = 32
    """Proposals of a mesh that surely fit the memory, and as many others."""

    # How far proposals are priced exactly

    slack: float = 0.02
    """Share by which the estimate of a bound may exceed the exact one; errors of groups even out (tested)."""
    slack_of_few: float = 0.05
    """Slack for few tasks, the errors of whose groups do not even out; their search ends by patience."""
    patience: int = 12
    """Partitions in a row that may be no better before a search of ``refined_below`` or more tasks ends; the
    partitions of so many tasks differ little."""
    patience_of_few: tuple[int, int] = (12, 24)
    """Patience per mesh once all partitions are ranked: (many meshes in line, one or two). With 8 on a single
    mesh, 2 of 141 random instances missed the optimum by more than 1 %."""
    far: float = 1.1
    """A mesh is far if nothing that was played on it came within this factor of the best. On 20 meshes of the
    first instances of ``benchmarks.planning``, the best partition of a mesh was at most 8 % faster than the
    best of its first few."""
    patience_far: int = 4
    """Partitions that are tried on a mesh that is far, of those that fit the memory."""
    less_memory: float = 0.98
    """Partitions that need less than this share of what did not fit are looked at when patience has ended."""
    least_work: float = 0.95
    """Share of the least work in a layer that was seen with so many ranks per stage, which other meshes may
    have: what differs is how steps are rounded to micro-batches."""
    hidden: float = 0.5
    """Share of the work in a layer that is left where communication and computation hide each other fully."""

    # Schedules of a partition

    templates: tuple[Template, ...] = ("continuous", "flush")
    """Templates that are played; the second only where the fastest schedule of the first does not fit. Where
    both were always played, no plan of 14 was faster."""
    most_groupings: int = 4
    """Numbers of buckets tried per partition, from 1 to all hTasks in proportion."""
    most_regrouped: int = 9
    """HTasks that are tried in every number of buckets where the usual numbers do not fit the memory."""
    modes: tuple[Mode, ...] = ("intra", "interleaved")
    """Ways to overlap operators inside of stages with several ranks."""
    overlaps_seen: int = 3
    """Partitions of a mesh that are played with overlap before what they hid is held against others."""
    hides_more: float = 1.5
    """Overlap is expected to hide at most this many times the most that it hid of what it could, on the same
    mesh so far. Seen were shares of 0.05 to 0.3, up to twice the median of a mesh."""
    most_orchestrated: int = 2
    """Schedules of a partition that are also played with overlap."""

    # Local search

    refined_below: int = 12
    """Partitions of fewer tasks than this may be refined with exact prices."""
    refine_within: float = 1.2
    """Meshes are refined if the least bound of their contiguous groups is at most this many times the best;
    other groups may come below that bound."""
    effort: Effort = Effort(orders=4, starts=4, neighbours=64, new_groups=256, appraisals=16, rounds=4)
    """Effort of the refinement on each mesh."""
    refined_kept: int = 4
    """Partitions that are kept of the refinement on a mesh."""
    least_memory: int = 16
    """Partitions per bound on their memory that are looked at where nothing else fits."""


DEFAULT_SETTINGS = SearchSettings()
