"""Costs from a profile: measurements, interpolated on top of the analytic shape."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from muxtune.costs.base import CostModel
from muxtune.costs.identity import own_ref
from muxtune.costs.interpolation import RatioTable
from muxtune.costs.overhead import ActionOverhead, StageSum, fit_overhead, sum_stages
from muxtune.costs.profile import Profile, describe_dims
from muxtune.costs.ref import CostsRef
from muxtune.costs.roofline import RooflineCosts, fit_coefficients
from muxtune.graph.attention_backends import AttentionName
from muxtune.model import ModelSpec
from muxtune.operators import COLLECTIVE_KINDS, KINDS, LINK_KINDS, PHASES, Operator, Phase
from muxtune.support.errors import UserError


class ExtrapolationWarning(UserWarning):
    """A cost was asked for at a shape that lies outside the measured ones."""


Dims = tuple[float, ...]

_OUTSIDE_ACTIONS = LINK_KINDS | {"optimizer"}
"""Kinds that are no operators of a forward or backward."""

_OUTSIDE = 1e-9
"""Logarithmic distance below which a shape counts as inside: rounding of logarithms."""


@dataclass(slots=True)
class _Asked:
    """Kinds that were priced, and of those beyond the measurements the operator farthest outside."""

    kinds: set[str] = field(default_factory=set)
    outside: dict[str, tuple[float, Operator]] = field(default_factory=dict)


@dataclass(slots=True)
class _Warnings:
    """What was said, and whether to say anything; a backbone and its shards share one."""

    exploring: bool = False
    said: set[str] = field(default_factory=set)
    asked: _Asked | None = None
    """None where nobody wants notes."""


class ProfiledCosts(CostModel):
    """What was measured, and between the measurements what the analytic shape and their ratios say.

    The logarithm of measured / analytic is interpolated multilinearly over the logarithms of the dimensions.
    Outside the measured shapes the ratio of the nearest edge is used and an :class:`ExtrapolationWarning`
    says once per kind how far outside. Collectives that were not measured at all cost what the fitted link
    says, with such a warning. Attention to carried keys has the ratio that attention of as many sequences and
    scores has.

    Args:
        profile: Measurements for this backbone's shapes.
        model: The backbone whose operators are priced.
        notes: What is doubtful about the profile where it is used, for every plan.

    Raises:
        UserError: The profile was measured for another shape or dtype.
    """

    def __init__(self, profile: Profile, model: ModelSpec, notes: Sequence[str] = ()) -> None:
        _check_same_shapes(profile, model)
        self.profile = profile
        self._notes = tuple(notes)
        self.model = model
        self.analytic = RooflineCosts(fit_coefficients(profile), model)
        self._tables = self._build_tables()
        self._cache: dict[tuple[Operator, Phase], tuple[float, float]] = {}
        self._warnings = _Warnings()
        self._shards: dict[int, Self] = {}
        self._overheads: dict[Phase, ActionOverhead] = dict.fromkeys(PHASES, ActionOverhead())
        self.stages: list[StageSum] = sum_stages(profile, self)
        """Measured stages beside the sums of their operators."""
        self._overheads = {
            phase: fit_overhead([stage for stage in self.stages if stage.phase == phase]) for phase in PHASES
        }
        self._cache.clear()  # was filled without overhead

    @property
    def ref(self) -> CostsRef:
        """Identity of the profile, for a plan."""
        ref = self.profile.ref
        if type(self) is ProfiledCosts:
            return ref
        with self.exploring():
            return own_ref(self, ref, self.latency_s)

    @property
    def contention(self) -> float | None:
        """Measured contention; None if the profile has nothing of the kind."""
        return None if self.profile.overlaps is None else self.profile.overlaps.contention

    @property
    def attention(self) -> AttentionName:
        """The profile's choice."""
        return self.profile.attention

    @property
    def largest_group(self) -> int | None:
        """Ranks of the largest group whose collectives were measured; 1 where none were."""
        return max((m.op.dims[1] for m in self.profile.of_kind("all_reduce")), default=1)

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator between others; nothing to do costs nothing.

        Raises:
            UserError: The profile has no measurement of this kind.
        """
        key = (op, phase)
        cached = self._cache.get(key)
        if cached is None:
            seconds, outside = self._interpolate(op, phase)
            if seconds and op.kind not in _OUTSIDE_ACTIONS:
                seconds = self._overheads[phase].operator_s(op.kind, seconds)
            cached = self._cache[key] = seconds, outside
        if self._warnings.asked is not None:
            _record(self._warnings.asked, op, cached[1])
        if cached[1] > _OUTSIDE and not self._warnings.exploring:
            self._warn(op, cached[1])
        return cached[0]

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """Notes of the profile, and how far the operators that are priced inside lie beyond it."""
        notes: list[str] = []
        before, asked = self._warnings.asked, _Asked()
        self._warnings.asked = asked
        try:
            yield notes
        finally:
            self._warnings.asked = before
        notes += self._notes
        notes += self.profile.notes
        notes += dict.fromkeys(doubt for phase in PHASES for doubt in self._overheads[phase].doubts)
        if asked.kinds & LINK_KINDS and self.analytic.coefficients.link_bytes_per_s == math.inf:
            notes.append("the measured transfers show no rate; larger ones are priced as if it had no limit")
        if asked.kinds & COLLECTIVE_KINDS and self.profile.overlaps is not None:
            notes += self.profile.overlaps.doubts
        notes += [self._describe(op, outside) for outside, op in asked.outside.values()]

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Do not warn inside: a search prices many shapes that no plan will have."""
        before, self._warnings.exploring = self._warnings.exploring, True
        try:
            yield
        finally:
            self._warnings.exploring = before

    def shard(self, tp: int) -> Self:
        """Costs on one of ``tp`` ranks: the measured ratios on the analytic shape of narrower operators.

        Widths of linears that were not measured take the ratio of the nearest.
        """
        if tp == 1:
            return self
        if tp not in self._shards:
            shard = copy.copy(self)
            shard.model = self.model.shard(tp)
            shard.analytic = RooflineCosts(self.analytic.coefficients, shard.model)
            shard._cache = {}
            shard._shards = {}
            self._shards[tp] = shard
        return self._shards[tp]

    def of_kinds(self, kinds: Set[str]) -> Self:
        """Costs of the part of the profile that has these kinds."""
        part = self.profile.of_kinds(kinds)
        if part is self.profile:
            return self
        costs = copy.copy(self)  # fits are to kinds that every profile has
        costs.profile = part
        costs._tables = {key: tables for key, tables in self._tables.items() if key[0] in kinds}
        costs._cache = {}
        costs._shards = {}
        return costs

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action whose operators sum up to ``operators_s``."""
        return self._overheads[phase].fixed_s + operators_s

    def overhead(self, phase: Phase) -> ActionOverhead:
        """What an action costs beyond its operators, as each was measured alone."""
        return self._overheads[phase]

    def _build_tables(self) -> dict[tuple[str, Phase], dict[Dims, RatioTable]]:
        points: dict[tuple[str, Phase], dict[Dims, dict[Dims, float]]] = {}
        no_link = self.analytic.coefficients.link_latency_s is None
        for m in self.profile.measurements:
            if m.op.kind == "stage" or (m.op.kind in LINK_KINDS and no_link):
                continue
            category, dims = _split(m.op)
            ratio = math.log(m.median_s / self.analytic.latency_s(m.op, m.phase))
            points.setdefault((m.op.kind, m.phase), {}).setdefault(category, {})[dims] = ratio
        return {
            key: {category: RatioTable(content) for category, content in categories.items()}
            for key, categories in points.items()
        }

    def _interpolate(self, op: Operator, phase: Phase) -> tuple[float, float]:
        """Seconds, and how far outside the measured shapes the operator lies (a logarithm)."""
        try:
            analytic_s = self.analytic.latency_s(op, phase)
        except UserError as error:  # over a link that was not measured
            raise self._unmeasured(op.kind, phase) from error
        if analytic_s == 0.0:  # nothing to do, or nobody to do it with
            return 0.0, 0.0
        kind, (category, dims) = op.kind, _split(op)
        if kind == "carried_attention":
            sequences, queries, keys = op.dims
            kind, dims = "attention", (math.sqrt(queries * keys), sequences)
        tables = self._tables.get((kind, phase))
        if tables is None and op.kind in COLLECTIVE_KINDS:
            return analytic_s, math.inf
        if tables is None:
            raise self._unmeasured(op.kind, phase)
        outside = 0.0
        table = tables.get(category)
        if table is None:
            nearest = min(tables, key=lambda known: (_distance(known, category), known))
            table, outside = tables[nearest], _distance(nearest, category)
        log_ratio, left_by = table.at(dims)
        return analytic_s * math.exp(log_ratio), max(outside, left_by)

    def _unmeasured(self, kind: str, phase: Phase) -> UserError:
        where = f"profile {self.profile.profile_id}"
        return UserError(f"{where} has no {phase} measurement of kind {kind}; profile this model again")

    def _warn(self, op: Operator, outside: float) -> None:
        if op.kind in self._warnings.said:
            return
        self._warnings.said.add(op.kind)
        sentence = f"{self._describe(op, outside)} (said once per kind)"
        warnings.warn(sentence, ExtrapolationWarning, stacklevel=4)

    def _describe(self, op: Operator, outside: float) -> str:
        profile_id = self.profile.profile_id
        if outside == math.inf:
            over = "its cost is that of messages over the fitted link"
            return f"profile {profile_id} measured no {op.kind}; {over}"
        return (
            f"{op.kind} at {describe_dims(op)} is a factor {math.exp(outside):.2f} outside what profile "
            f"{profile_id} measured; its cost there is the analytic one, scaled as at the edge"
        )


def _record(asked: _Asked, op: Operator, outside: float) -> None:
    asked.kinds.add(op.kind)
    if outside > max(_OUTSIDE, asked.outside.get(op.kind, (0.0, op))[0]):
        asked.outside[op.kind] = outside, op


def _split(op: Operator) -> tuple[Dims, Dims]:
    return KINDS[op.kind].split(op.dims)


def _distance(a: Dims, b: Dims) -> float:
    return max(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


_SHAPE_FIELDS = "family hidden ffn heads kv_heads head_dim vocab activation dtype".split()


def _check_same_shapes(profile: Profile, model: ModelSpec) -> None:
    measured = profile.model
    differing = [name for name in _SHAPE_FIELDS if getattr(measured, name) != getattr(model, name)]
    if differing:
        theirs = ", ".join(f"{name} {getattr(measured, name)}" for name in differing)
        ours = ", ".join(f"{name} {getattr(model, name)}" for name in differing)
        raise UserError(
            f"profile {profile.profile_id} was measured for {measured.name} ({theirs}); expected one for "
            f"{model.name} ({ours})"
        )
