"""What a session measures, in which order, and what is left of it after an interruption."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from muxtune.cluster import load_cluster
from muxtune.costs.profile import Overlap
from muxtune.graph.attention_backends import AttentionContest, AttentionName
from muxtune.graph.operators import COLLECTIVE_KINDS, FWD_ONLY, LINK_KINDS, PHASES, Operator
from muxtune.model import ModelSpec
from muxtune.support.errors import SpecError
from profiler.grid import operator_grid, powers
from profiler.worker_protocol import Line, Reading

SUITE = "torch"

_Entry = TypeVar("_Entry", bound=Hashable)

_LIMIT_S, _QUICK_LIMIT_S = 0.075, 0.1
"""Seconds per operator, phase and round, and those of a quick profile."""

_ROUNDS, _QUICK_ROUNDS = 2, 1
"""Operators are measured so often, minutes apart, so that a burst of other load does not own a shape."""

_TRANSFER_ROUNDS = 3
_COLLECTIVE_ROUNDS = 2

_OVERLAP_TOKENS = (64, 256, 1024)
"""Tokens of a linear beside an all-reduce: small, usual and large micro-batches."""

Listed = tuple[tuple[str, tuple[int, ...]], ...]
"""Kind and dimensions of operators, in order."""


class Job(BaseModel):
    """What the processes of one session measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec
    device: str
    suite: str
    ranks: int
    """Processes that measure the same operator at the same time."""
    operators: Listed
    """In the order of measurement; one that stands there twice is measured twice."""
    link_ranks: int
    """Processes that communicate; 0 if none do."""
    links: Listed
    """Collectives and transfers, in order; they are measured first."""
    overlaps: tuple[int, ...] = ()
    """Tokens of a linear beside an all-reduce of all processes that communicate, in order."""
    attention: AttentionName | None = None
    """Attention backend; None has them compete first."""
    limit_s: float
    """Seconds per operator and phase, each time."""

    @property
    def processes(self) -> int:
        """Number of processes."""
        return max(self.ranks if self.operators else 1, self.link_ranks if self.communicates else 0)

    @property
    def communicates(self) -> bool:
        """Whether ranks measure what they do together."""
        return bool(self.links or self.overlaps)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be measured."""
        return not (self.operators or self.links or self.overlaps)

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds that are measured."""
        return frozenset(kind for kind, _ in (*self.operators, *self.links))


def plan_job(
    model: ModelSpec,
    device: str,
    ranks: int,
    *,
    kinds: Set[str],
    link_ranks: int,
    quick: bool,
    attention: AttentionName | None = None,
) -> Job:
    """The whole job.

    Args:
        model: The backbone.
        device: Kind of device.
        ranks: Processes that measure operators at once.
        kinds: Kinds to measure.
        link_ranks: Processes that communicate; 0 if none can.
        quick: A coarser grid, in one round.
        attention: Attention backend, if it is chosen.

    Raises:
        SpecError: No rank can hold what is measured.
    """
    sizes = powers(2, max(link_ranks, 2), 2)
    grid = operator_grid(model, quick=quick, kinds=kinds, group_sizes=sizes)
    if device == "cpu":
        _check_room(model, ranks, grid)
    compute = [op for op in grid if op.kind not in LINK_KINDS]
    transfers = [op for op in grid if op.kind == "p2p"]  # which measures messages too
    collectives = [op for op in grid if op.kind in COLLECTIVE_KINDS]
    links = transfers * _TRANSFER_ROUNDS + collectives * _COLLECTIVE_ROUNDS if link_ranks else []
    order = random.Random(0)  # load that comes and goes must not follow an axis of the grid
    operators: list[Operator] = []
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    for _ in range(rounds):
        operators += order.sample(compute, len(compute))
    return Job(
        model=model,
        device=device,
        suite=SUITE,
        ranks=ranks,
        operators=tuple((op.kind, op.dims) for op in operators),
        link_ranks=link_ranks,
        links=tuple((op.kind, op.dims) for op in links),
        overlaps=_OVERLAP_TOKENS * rounds if links and ranks > 1 else (),
        attention=attention,
        limit_s=_QUICK_LIMIT_S if quick else _LIMIT_S,
    )


def remaining_job(job: Job, lines: Iterable[Line]) -> Job:
    """What is left of a job after some lines of it, each operator as often as it is still to be measured."""
    lines = tuple(lines)
    # Every rank reads operators, rank 0 alone what ranks do together.
    said = Counter((line.op.kind, line.op.dims, line.phase) for line in lines if isinstance(line, Reading))

    def done(kind: str, dims: tuple[int, ...]) -> int:
        phases = PHASES[:1] if kind in FWD_ONLY else PHASES
        readers = 1 if kind in LINK_KINDS else job.ranks
        return min(said[kind, dims, phase] for phase in phases) // readers

    overlapped = Counter(line.tokens for line in lines if isinstance(line, Overlap))
    contest = next((line for line in lines if isinstance(line, AttentionContest)), None)
    return job.model_copy(
        update={
            "operators": _without(job.operators, {each: done(*each) for each in job.operators}),
            "links": _without(job.links, {each: done(*each) for each in job.links}),
            "overlaps": _without(job.overlaps, overlapped),
            "attention": job.attention if contest is None else contest.chosen,
        }
    )


def _without(entries: Sequence[_Entry], done: Mapping[_Entry, int]) -> tuple[_Entry, ...]:
    """Entries less the first so many of each."""
    left = dict(done)
    kept: list[_Entry] = []
    for each in entries:
        if left.get(each, 0):
            left[each] -= 1
        else:
            kept.append(each)
    return tuple(kept)


def _check_room(model: ModelSpec, ranks: int, grid: Sequence[Operator]) -> None:
    """Refuse before anything is allocated a backbone whose largest measured stage no rank can hold."""
    layers = max((op.dims[0] for op in grid if op.kind == "stage"), default=1)
    loaded = model.model_copy(update={"source": "preset", "layers": layers, "vocab": 8})
    needed = loaded.loading_bytes + layers * model.layer_parameters * model.dtype_bytes
    available = load_cluster(f"cpu-{ranks}").device.memory_bytes
    if needed > available:
        need, has = (bytes_ / 2**30 for bytes_ in (needed, available))
        expected = f"one of which {layers} layers fit a rank: they need {need:.1f} GiB, it has {has:.1f} GiB"
        raise SpecError("model", model.name, expected)
