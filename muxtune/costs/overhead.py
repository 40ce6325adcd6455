"""What a whole action costs beyond the sum of its operators, learnt from measured stages.

An operator that is timed again and again finds its own code in the processor's caches, and nobody slices its
inputs or keeps its books for the backward; but it also finds its input in no cache, where in a stage the
operator before has just written it. So each class of operators gets a factor: stages with few and with many
adapters, with short and with long sequences tell them apart. What they do not tell apart stays alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import attention_calls
from muxtune.costs.base import CostModel
from muxtune.costs.compose import MicrobatchWork, stage_operators
from muxtune.costs.profile import Profile
from muxtune.graph.operators import stage_layout
from muxtune.operators import KINDS, Operator, Phase
from muxtune.peft import everywhere

CLASSES = ("linear", "adapter", "attention", "other")
"""Classes of kinds that have a factor of their own, and all others together. Profiled stages hold the
adapters of one method; those of the others are taken to differ as these do."""


def class_of(kind: str) -> str:
    """Class of an operator kind."""
    return KINDS[kind].fitted


@dataclass(frozen=True, slots=True)
class StageSum:
    """A measured stage beside its operators."""

    op: Operator
    phase: Phase
    measured_s: float
    classes_s: Mapping[str, float]
    """Sum over the operators of each class, each as it was measured alone."""
    operators: float
    """Number of operators that it runs, repetitions counted."""

    @property
    def operators_s(self) -> float:
        """Sum over all operators."""
        return sum(self.classes_s.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionOverhead:
    """``fixed_s + sum over operators of (factor of its class * seconds + per_operator_s)``."""

    fixed_s: float = 0.0
    per_operator_s: float = 0.0
    factors: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 1.0))
    stages: int = 0
    """Stages that it was fitted to; without any there is no overhead to see."""
    at_bounds: tuple[str, ...] = ()
    """Classes whose factor rests on a bound of the fit, and seconds that do."""

    @property
    def doubts(self) -> list[str]:
        """What the fit could not tell, as sentences."""
        if not self.stages:
            return ["no whole stage was measured: operators add up as if each ran alone, without overhead"]
        if not self.at_bounds:
            return []
        low, high = _FACTORS
        return [
            f"what operators take inside a stage rests on bounds of its fit ({', '.join(self.at_bounds)}; "
            f"factors {low:g} to {high:g}): the measured stages do not tell the classes apart"
        ]

    def operator_s(self, kind: str, alone_s: float) -> float:
        """Seconds between others of an operator that takes ``alone_s`` by itself."""
        return self.factors[class_of(kind)] * alone_s + self.per_operator_s


def sum_stages(profile: Profile, costs: CostModel) -> list[StageSum]:
    """Every measured stage of a profile with the operators that ``costs`` see in it."""
    sums = []
    for m in profile.of_kind("stage"):
        weighted = stage_operators(
            profile.model, m.op.dims[0], first=False, last=False, work=_stage_work(m.op), phase=m.phase
        )
        classes_s = dict.fromkeys(CLASSES, 0.0)
        for op, count in weighted:
            classes_s[class_of(op.kind)] += costs.latency_s(op, m.phase) * count
        operators = sum(count for _, count in weighted)
        sums.append(StageSum(m.op, m.phase, m.median_s, classes_s, operators))
    return sums


def fit_overhead(stages: Sequence[StageSum]) -> ActionOverhead:
    """Robust fit of relative residuals, with factors that are alike unless the stages say otherwise.

    Args:
        stages: Measured stages of one phase; none means no overhead.
    """
    if not stages:
        return ActionOverhead()
    from scipy.optimize import least_squares  # noqa: PLC0415  # a quarter of a second to import

    measured_s = np.array([stage.measured_s for stage in stages])
    classes_s = np.array([[stage.classes_s[name] for name in CLASSES] for stage in stages])
    operators = np.array([stage.operators for stage in stages])
    # Unknowns in units of the smallest stage, so that all are of the order of 1.
    unit_s = float(np.min(measured_s))
    unit_operators = float(np.min(operators))

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        fixed, per_operator, factors = x[0], x[1], x[2:]
        overhead_s = unit_s * (fixed + per_operator * operators / unit_operators)
        misfit = (overhead_s + classes_s @ factors) / measured_s - 1.0
        apart = np.log(factors) - np.log(factors).mean()
        return np.append(misfit, _ALIKE * apart)

    lower, upper = _FACTORS
    most = [_MOST_UNITS, _MOST_UNITS, *[upper] * len(CLASSES)]
    bounds = ([0.0, 0.0, *[lower] * len(CLASSES)], most)
    start = [0.01, 0.01, *[1.0] * len(CLASSES)]
    fit = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.05)
    fixed, per_operator, *factors = (float(value) for value in fit.x)
    return ActionOverhead(
        fixed_s=fixed * unit_s,
        per_operator_s=per_operator * unit_s / unit_operators,
        factors=dict(zip(CLASSES, factors, strict=True)),
        stages=len(stages),
        at_bounds=(
            *(f"{name} {value:.2f}" for name, value in zip(CLASSES, factors, strict=True) if _rests(value)),
            *(
                name
                for name, value in (("fixed seconds", fixed), ("seconds per operator", per_operator))
                if value > _MOST_UNITS * (1 - _AT_BOUND)  # none at all is what a device may well have
            ),
        ),
    )


_FACTORS = (0.5, 2.0)
"""Beyond these a factor would hide a wrong operator."""

_MOST_UNITS = 1.0
"""Most fixed seconds, and most seconds per operator, in units of the smallest stage: it has nothing else."""

_AT_BOUND = 0.01
"""Relative distance to a bound below which a factor rests on it; the fit stays strictly inside."""


def _rests(factor: float) -> bool:
    low, high = _FACTORS
    return factor < low * (1 + _AT_BOUND) or factor > high * (1 - _AT_BOUND)


_ALIKE = 0.1
"""A class that differs from the others by 30% weighs as much as a stage that is missed by 3%."""


def _stage_work(op: Operator) -> MicrobatchWork:
    layout = stage_layout(op)
    r = op.dims[2]
    tokens = [span.stop - span.start for span in layout.spans] if r else []
    return MicrobatchWork(
        tokens=layout.tokens,
        task_tokens=tuple(tokens),
        pefts=(everywhere(r),) * len(tokens) if r else (),
        attention=tuple((1.0, *call) for call in attention_calls(layout)),
        targets=0.0,
    )
