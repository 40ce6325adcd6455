"""The fastest schedule of a partition that fits the memory.

A schedule is only left out for one that is known to fit: a faster one whose memory nobody has asked about may
not fit, and one that needs a few percent less is then the best. So bounds are held against schedules that
fit, and memory is asked for in the order of time, until one fits or none can be better any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muxtune.orchestration import Mode
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.bounds import IterationBounds
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import (
    SecondsOf,
    in_mode,
    orchestrated,
    schedules,
)
from muxtune.schedule import Template

Fate = Literal["fits", "slower", "bound", "memory"]
"""Result for a partition. ``fits``: its fastest schedule that fits is the best so far. ``slower``: its
fastest schedule was slower than another partition's, and nobody asked if it fits. ``bound``: its exact bound
was no better than what had been found. ``memory``: what would be faster does not fit."""

Timed = tuple[float, PlanStructure]


@dataclass(frozen=True, slots=True)
class Quickest:
    """What became of a partition's schedules."""

    fate: Fate
    seconds: float = np.inf
    """Seconds of the structure; infinite unless its fate is ``fits`` or ``slower``."""
    structure: PlanStructure | None = None
    """The fastest that fits; of what does not fit, the fastest; none if a bound rules all out."""


class QuickestSchedule:
    """Finds a partition's fastest schedule that fits.

    Args:
        problem: The planning problem.
        templates: Templates that may be used.
        modes: Modes that stages with several ranks may overlap with, beside ``sequential``.
        forced: The only mode, if one is asked for.
        seconds_of: Iteration time of a structure.
        prune: Whether schedules are left out by bounds; without, all are played.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        templates: Sequence[Template],
        modes: Sequence[Mode],
        forced: Mode | None,
        seconds_of: SecondsOf,
        *,
        prune: bool,
    ) -> None:
        self._problem = problem
        self._templates = templates
        self._modes = modes
        self._forced = forced
        self._seconds_of = seconds_of
        self._prune = prune

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
        asked = _Memory(self._problem)
        timed = list(self._sequential(htasks, latency_s, mesh, bounds, share, limit_s, asked, most_groupings))
        fastest = [structure for _, structure in sorted(timed, key=_seconds)]
        if self._forced is not None:
            timed = self._overlapping(fastest, latency_s, asked, [self._forced])
        elif overlaps:
            timed += self._overlapping(fastest, latency_s, asked, self._modes)
        timed.sort(key=_seconds)
        if not timed:
            return Quickest("bound")
        if self._prune and timed[0][0] >= below_s:
            return Quickest("slower", *timed[0])
        found = asked.first(timed, limit_s)
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
        asked: _Memory,
        most_groupings: int,
    ) -> Iterator[Timed]:
        """Template by template, while one may be faster than what fits."""
        played: list[Timed] = []
        for template in sorted(self._templates, key=lambda each: bounds.of([each])):
            least_s = share * bounds.of([template]) if self._prune else 0.0
            if any(seconds <= least_s for seconds, _ in played):
                found = asked.first(sorted(played, key=_seconds), limit_s)
                limit_s = limit_s if found is None else found[0]
            if self._prune and least_s >= limit_s:
                continue
            for structure in schedules(htasks, latency_s, mesh, [template], most_groupings):
                played.append((self._seconds_of(self._problem, structure), structure))
        yield from played

    def _overlapping(
        self,
        fastest: Sequence[PlanStructure],
        latency_s: Sequence[float],
        asked: _Memory,
        modes: Sequence[Mode],
    ) -> list[Timed]:
        """The fastest that fit, with overlap inside of stages; all, if a forced mode needs too much."""

        def in_modes(structures: Sequence[PlanStructure]) -> list[Timed]:
            found: Iterable[PlanStructure] = orchestrated(self._problem, structures, latency_s, modes)
            if self._forced is not None:
                found = in_mode(self._problem, structures, latency_s, self._forced)
            return [(self._seconds_of(self._problem, structure), structure) for structure in found]

        most = self._problem.settings.most_orchestrated
        chosen = asked.fitting(fastest, most) or fastest[:most]
        timed = in_modes(chosen)
        if self._forced is not None and asked.first(sorted(timed, key=_seconds)) is None:
            timed = in_modes(fastest)
        return timed


class _Memory:
    """Whether structures fit the memory; each is computed once."""

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self._known: dict[PlanStructure, bool] = {}

    def fits(self, structure: PlanStructure) -> bool:
        if structure not in self._known:
            self._known[structure] = fits(self._problem, structure)
        return self._known[structure]

    def first(self, ordered: Iterable[Timed], below_s: float = np.inf) -> Timed | None:
        """The first that fits, of those below a limit."""
        for seconds, structure in ordered:
            if seconds >= below_s:
                break
            if self.fits(structure):
                return seconds, structure
        return None

    def fitting(self, ordered: Iterable[PlanStructure], count: int) -> list[PlanStructure]:
        """The first structures that fit, at most ``count``."""
        found: list[PlanStructure] = []
        for structure in ordered:
            if len(found) == count:
                break
            if self.fits(structure):
                found.append(structure)
        return found


def _seconds(timed: Timed) -> float:
    return timed[0]
