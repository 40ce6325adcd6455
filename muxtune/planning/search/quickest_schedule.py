"""The fastest schedule of a partition that fits the memory.

A schedule is only left out for one that is known to fit: a faster one whose memory nobody has asked about may
not fit, and one that needs a few percent less is then the best. So bounds are held against schedules that
fit, and memory is asked for in the order of time, until one fits or none can be better any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal

import numpy as np

from muxtune.orchestration import Mode
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.bounds import IterationBounds
from muxtune.planning.problem.memory_limit import MemoryLimit
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import (
    in_mode,
    orchestrated,
    schedules,
)
from muxtune.planning.search.tried import Tried, Valued, value_of
from muxtune.schedule import Template

Fate = Literal["fits", "slower", "bound", "memory"]
"""Result for a partition. ``fits``: its fastest schedule that fits is the best so far. ``slower``: its
fastest schedule was slower than another partition's, and nobody asked if it fits. ``bound``: its exact bound
was no better than what had been found. ``memory``: what would be faster does not fit."""


@dataclass(frozen=True, slots=True)
class Quickest:
    """What became of a partition's schedules."""

    fate: Fate
    value: float = np.inf
    """Value of the structure; infinite unless its fate is ``fits`` or ``slower``."""
    structure: PlanStructure | None = None
    """The fastest that fits; of what does not fit, the fastest; none if a bound rules all out."""


class QuickestSchedule:
    """Finds a partition's fastest schedule that fits.

    Args:
        problem: The planning problem.
        templates: Templates that may be used.
        modes: Modes that stages with several ranks may overlap with, beside ``sequential``.
        forced: The only mode, if one is asked for.
        tried: Values schedules, and remembers them.
        prune: Whether schedules are left out by bounds; without, all are played.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        templates: Sequence[Template],
        modes: Sequence[Mode],
        forced: Mode | None,
        tried: Tried,
        *,
        prune: bool,
    ) -> None:
        self._problem = problem
        self._templates = templates
        self._modes = modes
        self._forced = forced
        self._tried = tried
        self._prune = prune
        self._hidden: dict[Mesh, list[float]] = {}
        """Per mesh, what overlap hid of what it could hide, partition by partition."""

    def least_share(self, mesh: Mesh, share: float) -> float:
        """What overlap leaves of the time of a partition at least, by what it left of others on the mesh.

        Args:
            mesh: The mesh.
            share: What is left if all is hidden that can be.
        """
        settings, seen = self._problem.settings, self._hidden.get(mesh, [])
        if not self._prune or len(seen) < settings.overlaps_seen:
            return share
        return 1 - min(1.0, settings.hides_more * max(seen)) * (1 - share)

    def find(
        self,
        htasks: Sequence[HTaskChoice],
        latency_s: Sequence[float],
        mesh: Mesh,
        bounds: IterationBounds,
        *,
        overlaps: bool,
        share: float = 1.0,
        below_s: float = np.inf,
        most_groupings: int | None = None,
    ) -> Quickest:
        """The fastest schedule below ``below_s`` that fits.

        Args:
            htasks: The partition.
            latency_s: Seconds of a micro-batch of each, on the slowest stage.
            mesh: The mesh.
            bounds: Exact bounds of the partition.
            overlaps: Whether operators inside of a stage may overlap.
            share: Share of a bound that is left if they do.
            below_s: Slower schedules are of no interest if schedules are pruned.
            most_groupings: Numbers of buckets to try, by default those of the settings; all of them if none
                of a few fits.
        """
        settings = self._problem.settings
        most_groupings = most_groupings or settings.most_groupings
        limit_s = below_s if self._prune else np.inf
        asked = MemoryLimit(self._problem)
        timed = list(self._sequential(htasks, latency_s, mesh, bounds, share, limit_s, asked, most_groupings))
        fastest = [structure for _, structure in sorted(timed, key=value_of)]
        if self._forced is not None:
            timed = self._overlapping(fastest, latency_s, asked, [self._forced])
        elif overlaps and timed:
            sequential_s = min(map(value_of, timed))
            if self.least_share(mesh, share) * sequential_s < limit_s:
                overlapping = self._overlapping(fastest, latency_s, asked, self._modes)
                hidden_s = sequential_s - min(map(value_of, overlapping), default=sequential_s)
                self._hidden.setdefault(mesh, []).append(hidden_s / max((1 - share) * sequential_s, 1e-12))
                timed += overlapping
        timed.sort(key=value_of)
        if not timed:
            return Quickest("bound")
        if self._prune and timed[0][0] >= below_s:
            return Quickest("slower", *timed[0])
        found = self._first(asked, timed, limit_s)
        if found is not None:
            return Quickest("fits", *found)
        if most_groupings < len(htasks) <= settings.most_regrouped:  # others may need less
            return self.find(
                htasks,
                latency_s,
                mesh,
                bounds,
                overlaps=overlaps,
                share=share,
                below_s=below_s,
                most_groupings=len(htasks),
            )
        return Quickest("memory", structure=timed[0][1])

    def _sequential(
        self,
        htasks: Sequence[HTaskChoice],
        latency_s: Sequence[float],
        mesh: Mesh,
        bounds: IterationBounds,
        share: float,
        limit_s: float,
        asked: MemoryLimit,
        most_groupings: int,
    ) -> Iterator[Valued]:
        """Template by template, until the fastest schedule fits: others only need less memory."""
        played: list[Valued] = []
        for template in sorted(self._templates, key=lambda each: bounds.of([each])):
            least_s = share * bounds.of([template]) if self._prune else 0.0
            if self._prune and played:
                fastest = min(played, key=value_of)
                if fastest[0] >= limit_s or asked.fits(fastest[1]):
                    break
            if self._prune and least_s >= limit_s:
                continue
            for structure in schedules(htasks, latency_s, mesh, [template], most_groupings):
                played.append((self._tried.value(structure), structure))
        yield from played

    def _overlapping(
        self,
        fastest: Sequence[PlanStructure],
        latency_s: Sequence[float],
        asked: MemoryLimit,
        modes: Sequence[Mode],
    ) -> list[Valued]:
        """The fastest that fit, with overlap inside of stages; all, if a forced mode needs too much."""

        def in_modes(structures: Sequence[PlanStructure]) -> list[Valued]:
            found: Iterable[PlanStructure] = orchestrated(self._problem, structures, latency_s, modes)
            if self._forced is not None:
                found = in_mode(self._problem, structures, latency_s, self._forced)
            return [(self._tried.value(structure), structure) for structure in found]

        most = self._problem.settings.most_orchestrated
        chosen = list(islice(filter(asked.fits, fastest), most)) or fastest[:most]
        timed = in_modes(chosen)
        if self._forced is not None and self._first(asked, timed) is None:
            timed = in_modes(fastest)
        return timed

    @staticmethod
    def _first(limit: MemoryLimit, valued: Iterable[Valued], below: float = np.inf) -> Valued | None:
        """The best that fits the memory, of those below a value."""
        better = takewhile(lambda each: each[0] < below, sorted(valued, key=value_of))
        return next((each for each in better if limit.fits(each[1])), None)
