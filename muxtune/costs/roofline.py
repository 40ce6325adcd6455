"""A device as a handful of physical coefficients, and their fit to a profile."""

from __future__ import annotations

import copy
import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from muxtune.costs.base import CostModel
from muxtune.costs.identity import own_ref
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.operator_work import operator_work
from muxtune.costs.profile import Profile
from muxtune.costs.ref import CostsRef
from muxtune.graph.operators import LINK_KINDS, Operator, Phase
from muxtune.model import ModelSpec
from muxtune.support.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCoefficients:
    """``launches * launch_s + (compute_s ** overlap + memory_s ** overlap) ** (1 / overlap)``."""

    device: str
    launch_s: float
    """Seconds per kernel or library call."""
    flops_per_s: float
    bytes_per_s: float
    overlap: float
    """1: compute and memory time add up; large: the longer of the two counts (roofline)."""
    link_latency_s: float | None
    """None where no transfer was measured: messages and collectives then have no price."""
    link_bytes_per_s: float | None
    """Infinite where the measured transfers are too small to show a rate."""
    error: float
    """Mean relative error over the measurements that they were fitted to."""


class RooflineCosts(CostModel):
    """Costs from coefficients alone, for devices and shapes that nobody measured.

    Args:
        coefficients: Coefficients of the device.
        model: The backbone whose operators are priced.
    """

    def __init__(self, coefficients: RooflineCoefficients, model: ModelSpec) -> None:
        self.coefficients = coefficients
        self.model = model

    @property
    def ref(self) -> CostsRef:
        """Identity, for a plan."""
        ref = self._ref
        return ref if type(self) is RooflineCosts else own_ref(self, ref, self.latency_s)

    @property
    def _ref(self) -> CostsRef:
        """Identity of the coefficients."""
        digest = hashlib.sha256(repr(asdict(self.coefficients)).encode()).hexdigest()
        device = self.coefficients.device
        return CostsRef(
            kind="fitted", profile_id=f"roofline-{device}-{digest[:12]}", device=device, digest=digest
        )

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator; nothing to do costs nothing.

        Raises:
            UserError: It goes over a link that nobody measured.
        """
        if 0 in op.dims:
            return 0.0
        c = self.coefficients
        work = operator_work(op, phase, self.model)
        if op.kind in LINK_KINDS:
            if not (work.launches or work.bytes):  # nobody to do it with
                return 0.0
            if c.link_latency_s is None or c.link_bytes_per_s is None:
                raise UserError(
                    f"{self._ref.profile_id}: no transfers were measured, so {op.kind} has no price"
                )
            return work.launches * c.link_latency_s + work.bytes / c.link_bytes_per_s
        compute_s, memory_s = work.flops / c.flops_per_s, work.bytes / c.bytes_per_s
        longer_s, shorter_s = max(compute_s, memory_s), min(compute_s, memory_s)
        # The longer one is factored out, so that no power underflows.
        overlapped: float = (1.0 + (shorter_s / longer_s) ** c.overlap) ** (1.0 / c.overlap)
        return work.launches * c.launch_s + longer_s * overlapped

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """The sum itself: the coefficients know no overhead between operators."""
        return operators_s

    def shard(self, tp: int) -> Self:
        """Costs on one of ``tp`` ranks: the same device, narrower operators."""
        shard = copy.copy(self)
        shard.model = self.model.shard(tp)
        return shard

    def exploring(self) -> AbstractContextManager[None]:
        """Changes nothing: a formula has no shapes that it was not measured at."""
        return nullcontext()


def fit_coefficients(profile: Profile) -> RooflineCoefficients:
    """Coefficients that fit a profile best, in relative terms and with every kind counting the same.

    Only kinds that every profile has: the same ones come out, whatever else was measured.

    Raises:
        UserError: The profile has no operators to fit to.
    """
    rows = [m for m in profile.measurements if m.op.kind in _FITTED]
    if not rows:
        raise UserError(f"profile {profile.profile_id} has no measured operators")
    work = np.array([operator_work(m.op, m.phase, profile.model) for m in rows])
    measured_s = np.array([m.median_s for m in rows])
    kinds = [m.op.kind for m in rows]
    weights = np.array([1.0 / kinds.count(kind) for kind in kinds])
    launch_s, flop_s, byte_s, overlap = _fit_device(work, measured_s, np.sqrt(weights))
    link_latency_s, link_bytes_per_s = _fit_link(profile)
    coefficients = RooflineCoefficients(
        device=profile.provenance.device,
        launch_s=launch_s,
        flops_per_s=1.0 / flop_s,
        bytes_per_s=1.0 / byte_s,
        overlap=overlap,
        link_latency_s=link_latency_s,
        link_bytes_per_s=link_bytes_per_s,
        error=float("nan"),
    )
    costs = RooflineCosts(coefficients, profile.model)
    predicted_s = np.array([costs.latency_s(m.op, m.phase) for m in rows])
    error = float(np.average(np.abs(predicted_s / measured_s - 1.0), weights=weights))
    return RooflineCoefficients(**(asdict(coefficients) | {"error": error}))


_FITTED = PLAIN_KINDS - LINK_KINDS - {"stage", "feed"}
"""Neither sums of others, nor links, nor what runs in Python on the host."""

_MAX_OVERLAP = 8.0
"""Beyond this the smooth maximum is within 10% of the sharp one everywhere and the fit is flat."""


def _fit_device(work: Array, measured_s: Array, weights: Array) -> tuple[float, float, float, float]:
    from scipy.optimize import least_squares  # noqa: PLC0415  # a quarter of a second to import

    flops, bytes_, launches = work.T
    log_measured = np.log(measured_s)

    def residuals(x: Array) -> Array:
        launch_s, flop_s, byte_s = np.exp(x[:3])
        with np.errstate(divide="ignore"):  # an operator without flops: exp(-inf) is the 0 it should be
            log_compute, log_memory = np.log(flops * flop_s), np.log(bytes_ * byte_s)
        log_body = np.logaddexp(x[3] * log_compute, x[3] * log_memory) / x[3]
        predicted = np.log(launches * launch_s + np.exp(log_body))
        return np.asarray(weights * (predicted - log_measured))

    start = np.array(
        [
            np.log(np.min(measured_s / launches)),
            np.log(np.min(measured_s[flops > 0] / flops[flops > 0])),
            np.log(np.min(measured_s / bytes_)),
            2.0,
        ]
    )
    span = np.array([12.0, 12.0, 12.0])
    lower, upper = np.append(start[:3] - span, 1.0), np.append(start[:3] + span, _MAX_OVERLAP)
    fit = least_squares(residuals, start, bounds=(lower, upper), loss="soft_l1", f_scale=0.1)
    launch_s, flop_s, byte_s = (float(value) for value in np.exp(fit.x[:3]))
    return launch_s, flop_s, byte_s, float(fit.x[3])


def _fit_link(profile: Profile) -> tuple[float | None, float | None]:
    """Latency and bytes per second of the measured transfers, by relative least squares; None of none."""
    rows = list(profile.of_kind("p2p"))
    if not rows:
        return None, None
    from scipy.optimize import nnls  # noqa: PLC0415  # a quarter of a second to import

    measured_s = np.array([m.median_s for m in rows])
    terms = np.array([(1.0, float(m.op.dims[0])) for m in rows]) / measured_s[:, None]
    scale = terms.max(axis=0)
    latency_s, s_per_byte = (nnls(terms / scale, np.ones(len(rows)))[0] / scale).tolist()
    return latency_s, 1.0 / s_per_byte if s_per_byte > 0 else math.inf
