"""What a whole action costs beyond the sum of its operators, learnt from measured stages.

An operator that is timed again and again finds its own code in the processor's caches, and nobody slices its
inputs or keeps its books for the backward. Between other operators it costs a little more; how much is the
same for all of them, so stages with few and with many adapters tell it apart from everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxtune.alignment import attention_calls
from muxtune.costs.base import CostModel
from muxtune.costs.compose import MicrobatchWork, stage_operators
from muxtune.costs.profile import Profile
from muxtune.operators import Operator, Phase, stage_layout
from muxtune.workload import LoraSpec


@dataclass(frozen=True, slots=True)
class StageSum:
    """A measured stage beside the sum of its operators."""

    op: Operator
    phase: Phase
    measured_s: float
    operators_s: float
    """Sum over its operators, each as it was measured alone."""
    operators: float
    """How many they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionOverhead:
    """``fixed_s + factor * (operators_s + operators * per_operator_s)``."""

    fixed_s: float = 0.0
    factor: float = 1.0
    per_operator_s: float = 0.0

    def stage_s(self, stage: StageSum) -> float:
        """Seconds of a stage with this overhead."""
        return self.fixed_s + self.factor * (stage.operators_s + stage.operators * self.per_operator_s)


def sum_stages(profile: Profile, costs: CostModel) -> list[StageSum]:
    """Every measured stage of a profile with the operators that ``costs`` see in it."""
    sums = []
    for m in profile.of_kind("stage"):
        weighted = stage_operators(
            profile.model, m.op.dims[0], first=False, last=False, work=_stage_work(m.op), phase=m.phase
        )
        operators_s = sum(costs.latency_s(op, m.phase) * count for op, count in weighted)
        operators = sum(count for _, count in weighted)
        sums.append(StageSum(m.op, m.phase, m.median_s, operators_s, operators))
    return sums


def fit_overhead(stages: Sequence[StageSum]) -> ActionOverhead:
    """Robust fit of relative residuals; none without stages.

    Args:
        stages: Of one phase.
    """
    if not stages:
        return ActionOverhead()
    from scipy.optimize import least_squares  # noqa: PLC0415  # a quarter of a second to import

    measured_s = np.array([stage.measured_s for stage in stages])
    operators_s = np.array([stage.operators_s for stage in stages])
    operators = np.array([stage.operators for stage in stages])
    # Unknowns in units of the smallest stage, so that all are of the order of 1.
    unit_s = float(np.min(measured_s))
    unit_operators = float(np.min(operators))

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        overhead_s = unit_s * (x[0] + x[2] * operators / unit_operators)
        return np.asarray((overhead_s + x[1] * operators_s) / measured_s - 1.0)

    bounds = ([0.0, _FACTORS[0], 0.0], [1.0, _FACTORS[1], 1.0])
    fit = least_squares(residuals, [0.01, 1.0, 0.01], bounds=bounds, loss="soft_l1", f_scale=0.05)
    fixed, factor, per_operator = (float(value) for value in fit.x)
    return ActionOverhead(
        fixed_s=fixed * unit_s,
        factor=factor,
        per_operator_s=per_operator * unit_s / unit_operators / factor,
    )


_FACTORS = (0.5, 2.0)
"""Beyond these the factor would hide a wrong operator."""


def _stage_work(op: Operator) -> MicrobatchWork:
    layout = stage_layout(op)
    r = op.dims[2]
    lora = LoraSpec(method="lora", r=r, alpha=r, targets=("all-linear",))
    return MicrobatchWork(
        tokens=layout.tokens,
        task_tokens=tuple(span.stop - span.start for span in layout.spans),
        loras=(lora,) * len(layout.spans),
        attention=tuple((1.0, *call) for call in attention_calls(layout)),
        targets=0.0,
    )
