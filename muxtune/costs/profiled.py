"""Costs from a profile: measurements, interpolated on top of the analytic shape."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from muxtune.attention import AttentionName
from muxtune.costs.base import CostModel
from muxtune.costs.interpolation import RatioTable
from muxtune.costs.overhead import ActionOverhead, StageSum, fit_overhead, sum_stages
from muxtune.costs.profile import Profile, describe_dims
from muxtune.costs.roofline import RooflineCosts, fit_coefficients
from muxtune.errors import UserError
from muxtune.model import ModelSpec
from muxtune.operators import COLLECTIVE_KINDS, LINK_KINDS, PHASES, Operator, Phase
from muxtune.plan import CostsRef


class ExtrapolationWarning(UserWarning):
    """A cost was asked for at a shape that lies outside the measured ones."""


Dims = tuple[float, ...]

_SPLITS: dict[str, Callable[[Dims], tuple[Dims, Dims]]] = {
    "linear": lambda dims: (dims[:2], dims[2:]),
    "lora": lambda dims: (dims[:2], dims[2:]),
    # Length outside: long sequences are measured in smaller numbers.
    "attention": lambda dims: ((), dims[::-1]),
    # Parameters per tensor: few tensors never have the parameters of many.
    "optimizer": lambda dims: ((), (dims[0], dims[1] / dims[0])),
}
"""Per kind: categories, which are looked up, and dimensions, which are interpolated in this order."""

_OUTSIDE_ACTIONS = LINK_KINDS | {"optimizer"}
"""Kinds that are no operators of a forward or backward."""

_OUTSIDE = 1e-9
"""Logarithmic distance below which a shape counts as inside: rounding of logarithms."""


@dataclass(slots=True)
class _Warnings:
    """What was said, and whether to say anything; a backbone and its shards share one."""

    exploring: bool = False
    said: set[str] = field(default_factory=set)


class ProfiledCosts(CostModel):
    """What was measured, and between the measurements what the analytic shape and their ratios say.

    The logarithm of measured / analytic is interpolated multilinearly over the logarithms of the dimensions.
    Outside the measured shapes the ratio of the nearest edge is used and an :class:`ExtrapolationWarning`
    says once per kind how far outside. Collectives that were not measured at all cost what the fitted link
    says, with such a warning. Attention to carried keys has the ratio that attention of as many sequences and
    scores has.

    Args:
        profile: Of this backbone's shapes.
        model: The backbone whose operators are priced.

    Raises:
        UserError: The profile was measured for another shape or dtype.
    """

    def __init__(self, profile: Profile, model: ModelSpec) -> None:
        _check_same_shapes(profile, model)
        self.profile = profile
        self.model = model
        self.analytic = RooflineCosts(fit_coefficients(profile), model)
        self._tables = self._build_tables()
        self._cache: dict[tuple[Operator, Phase], tuple[float, float]] = {}
        self._warnings = _Warnings()
        self._shards: dict[int, ProfiledCosts] = {1: self}
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
        return self.profile.ref

    @property
    def contention(self) -> float | None:
        """As measured; None if the profile has nothing of the kind."""
        return None if self.profile.overlaps is None else self.profile.overlaps.contention

    @property
    def attention(self) -> AttentionName:
        """The profile's choice."""
        return self.profile.attention

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
        if cached[1] > _OUTSIDE and not self._warnings.exploring:
            self._warn(op, cached[1])
        return cached[0]

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Do not warn inside: a search prices many shapes that no plan will have."""
        before, self._warnings.exploring = self._warnings.exploring, True
        try:
            yield
        finally:
            self._warnings.exploring = before

    def shard(self, tp: int) -> ProfiledCosts:
        """Of one of ``tp`` ranks: the measured ratios on top of the analytic shape of narrower operators.

        Widths of linears that were not measured take the ratio of the nearest.
        """
        if tp not in self._shards:
            shard = copy.copy(self)
            shard.model = self.model.shard(tp)
            shard.analytic = RooflineCosts(self.analytic.coefficients, shard.model)
            shard._cache = {}
            shard._shards = {1: shard}
            self._shards[tp] = shard
        return self._shards[tp]

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action whose operators sum up to ``operators_s``."""
        return self._overheads[phase].fixed_s + operators_s

    def overhead(self, phase: Phase) -> ActionOverhead:
        """What an action costs beyond its operators, as each was measured alone."""
        return self._overheads[phase]

    def _build_tables(self) -> dict[tuple[str, Phase], dict[Dims, RatioTable]]:
        points: dict[tuple[str, Phase], dict[Dims, dict[Dims, float]]] = {}
        for m in self.profile.measurements:
            if m.op.kind == "stage":
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
        analytic_s = self.analytic.latency_s(op, phase)
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
            where = f"profile {self.profile.profile_id}"
            raise UserError(f"{where} has no {phase} measurement of kind {op.kind}; profile this model again")
        outside = 0.0
        table = tables.get(category)
        if table is None:
            nearest = min(tables, key=lambda known: (_distance(known, category), known))
            table, outside = tables[nearest], _distance(nearest, category)
        log_ratio, left_by = table.at(dims)
        return analytic_s * math.exp(log_ratio), max(outside, left_by)

    def _warn(self, op: Operator, outside: float) -> None:
        if op.kind in self._warnings.said:
            return
        self._warnings.said.add(op.kind)
        if outside == math.inf:
            warnings.warn(
                f"profile {self.profile.profile_id} measured no {op.kind}; its cost is that of messages over "
                "the fitted link (said once per kind)",
                ExtrapolationWarning,
                stacklevel=4,
            )
            return
        warnings.warn(
            f"{op.kind} at {describe_dims(op)} is a factor {math.exp(outside):.2f} outside what profile "
            f"{self.profile.profile_id} measured; its cost there is the analytic one, scaled as at the edge "
            "(said once per kind)",
            ExtrapolationWarning,
            stacklevel=4,
        )


def _split(op: Operator) -> tuple[Dims, Dims]:
    split = _SPLITS.get(op.kind)
    return split(op.dims) if split else ((), op.dims)


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
