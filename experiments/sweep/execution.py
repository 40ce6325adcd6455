"""Planning of points, in whichever process; nothing here needs torch.

A process keeps the operator costs and the planning problems that it used last: points that differ in policy
or options alone share what their problem has priced.
"""

from __future__ import annotations

import hashlib
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

from experiments.sweep.inputs import PointInputs
from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.plan import Plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import UserError
from muxtune.support.registry import PluginError
from muxtune.tasks import Workload
from sim.search import search_problem

KEPT_PROBLEMS = 4
"""Planning problems that a process keeps, with all their examples (about 10 MB for 8 tasks)."""

KEPT_COSTS = 32

Status = Literal["planned", "refused", "failed"]
"""``refused``: no such plan exists, for the reason given. ``failed``: our own or a policy's mistake."""

Outcome = dict[str, object]
"""Columns of a row beside its fields; plain data."""


class CostsSource(Protocol):
    """Finds operator costs. Travels to workers, and equal sources find equal costs."""

    def __hash__(self) -> int: ...

    def __call__(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
        """Costs of the cluster's device for a backbone, whatever the workload.

        Raises:
            UserError: There are none.
        """
        ...

    def prepare(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> None:
        """What must not happen in all workers at once; called before, per backbone and cluster."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Points that one process plans one after the other."""

    digests: tuple[str, ...]
    inputs: tuple[PointInputs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutcome:
    """What became of a batch."""

    outcomes: dict[str, Outcome]
    """Outcome of each point, by the point's digest."""
    warnings: tuple[str, ...]
    """Texts of warnings, each once."""


def plan_batch(batch: Batch, source: CostsSource) -> BatchOutcome:
    """Plan all points of a batch; a point that cannot be planned has an outcome that says why."""
    outcomes: dict[str, Outcome] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for digest, inputs in zip(batch.digests, batch.inputs, strict=True):
            start_s = time.perf_counter()
            try:
                outcome = plan_columns(_plan(inputs, source))
            except PluginError as error:
                outcome = failure_columns("failed", str(error))
            except UserError as error:
                outcome = failure_columns("refused", " ".join(str(error).split()))
            except (
                Exception
            ) as error:  # a policy may come from elsewhere; its mistake is one row, not a sweep
                outcome = failure_columns("failed", _with_place(error))
            outcomes[digest] = outcome | {"planning_s": time.perf_counter() - start_s}
    texts = dict.fromkeys(str(warning.message) for warning in caught)
    return BatchOutcome(outcomes=outcomes, warnings=tuple(texts))


def plan_columns(plan: Plan) -> Outcome:
    """Columns of a planned point: what was decided, and all of ``predicted``."""
    return {
        "status": "planned",
        "failure": None,
        "template": plan.template,
        "tp": plan.parallelism.tp,
        "pp": plan.parallelism.pp,
        "dp": plan.parallelism.dp,
        "layers_per_stage": list(plan.parallelism.layers_per_stage),
        "htasks": len(plan.htasks),
        "partition": ",".join("+".join(htask.task_ids) for htask in plan.htasks),
        "alignments": [_alignment_text(htask.alignment, htask.chunk_tokens) for htask in plan.htasks],
        "buckets": [list(bucket) for bucket in plan.buckets],
        "costs": plan.costs.profile_id,
        "costs_kind": plan.costs.kind,
        "plan_digest": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        **plan.predicted.model_dump(mode="json", exclude={"made_for"}),
        "max_peak_memory_bytes": max(plan.predicted.peak_memory_bytes),
    }


def failure_columns(status: Status, reason: str) -> Outcome:
    """Columns of a point without a plan."""
    return {"status": status, "failure": reason}


def _with_place(error: Exception) -> str:
    """A failure in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(place.filename).name}:{place.lineno})"
    )


def _alignment_text(alignment: str, chunk_tokens: int | None) -> str:
    return alignment if chunk_tokens is None else f"{alignment} {chunk_tokens}"


def _plan(inputs: PointInputs, source: CostsSource) -> Plan:
    problem = _problem(inputs.workload, inputs.model, inputs.cluster, source)
    return search_problem(problem, policy=inputs.policy, options=inputs.options)


@lru_cache(maxsize=KEPT_PROBLEMS)
def _problem(
    workload: Workload, model: ModelSpec, cluster: ClusterSpec, source: CostsSource
) -> PlanningProblem:
    workload.check(model)  # before any time goes into its costs
    return PlanningProblem(workload, model, cluster, _costs(_Any(workload), model, cluster, source))


@dataclass(frozen=True, slots=True, eq=False)
class _Any:
    """A workload that a cache takes for any other: costs do not depend on it."""

    workload: Workload

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Any)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=KEPT_COSTS)
def _costs(workload: _Any, model: ModelSpec, cluster: ClusterSpec, source: CostsSource) -> CostModel:
    return source(workload.workload, model, cluster)
