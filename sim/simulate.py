"""What a plan would do, from the durations in its file or operator by operator."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.costs.base import CostModel
from muxtune.plan import (
    Plan,
    Predicted,
    finish_plan,
    ideal_iteration_s,
    iteration_tokens,
    predict,
    predict_plan,
    stage_times,
)
from muxtune.schedule import Action, build_schedule
from muxtune.support.errors import SpecError
from sim.engine import play_clocks, simulate_schedule
from sim.noise import Noise
from sim.operators import OperatorWork
from sim.plan_programs import PlanPrograms
from sim.report import SimulationReport


def simulate_plan(plan: Plan, *, iterations: int | None = None) -> SimulationReport:
    """Play a plan with the durations that it carries, whole clocks at a time.

    Args:
        plan: Checked, as :func:`muxtune.plan.load_plan` returns it.
        iterations: Play so many iterations of the plan's template instead of those that it has scheduled.

    Returns:
        The timeline, and the numbers of ``plan.predicted`` computed from it.

    Raises:
        SpecError: ``iterations`` is below 1.
    """
    spans = simulate_schedule(_schedule(plan, iterations), stage_times(plan))
    return SimulationReport(spans=tuple(spans), predicted=_of_plan(plan, predict_plan(plan, spans)))


def simulate_operators(
    plan: Plan,
    costs: CostModel,
    *,
    iterations: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
    record: bool = True,
) -> SimulationReport:
    """Play a plan operator by operator, with costs that price them. Reads the datasets.

    With the costs that the plan was made with and without noise, the iteration takes as long as
    :func:`simulate_plan` says.

    Args:
        plan: Checked, as :func:`muxtune.plan.load_plan` returns it.
        costs: Costs of the plan's devices, for its whole backbone; see :func:`sim.costs.plan_costs`.
        iterations: Iterations to play, as for :func:`simulate_plan`.
        seed: Seed of the noise.
        noise: Standard deviation of the logarithm of an operator's or a transfer's duration, which keeps its
            mean.
        record: Whether the report has the operators' spans.

    Returns:
        The timeline, and the numbers of ``plan.predicted`` computed from it; durations of clocks are those
        without noise.

    Raises:
        UserError: ``iterations`` is below 1, ``noise`` or ``seed`` is negative, or a dataset cannot be read.
    """
    schedule = _schedule(plan, iterations)
    spread = Noise(sigma=noise, seed=seed)
    programs = PlanPrograms(plan, costs)
    times = programs.times()
    work = OperatorWork(
        programs,
        stages=plan.parallelism.pp,
        contention=plan.orchestration.contention,
        noise=spread,
        record=record,
    )
    spans = play_clocks([times.cut(actions) for actions in schedule], work, times.p2p_s, spread)
    predicted = predict(
        spans,
        times=times,
        microbatches=plan.microbatches,
        tokens=iteration_tokens(plan),
        peak_memory_bytes=plan.predicted.peak_memory_bytes,
        theoretical_bubble_fraction=plan.predicted.theoretical_bubble_fraction,
        alignment=plan.predicted.alignment,
        ideal_s=ideal_iteration_s(plan.decisions, plan.derived),
    )
    return SimulationReport(spans=tuple(spans), predicted=_of_plan(plan, predicted), operators=work.log)


def _of_plan(plan: Plan, predicted: Predicted) -> Predicted:
    """The prediction with the digests of the plan that it is of, so that the plan may have it."""
    return finish_plan(plan.with_predicted(predicted)).predicted


def _schedule(plan: Plan, iterations: int | None) -> Sequence[Sequence[Action]]:
    if iterations is None:
        return plan.actions
    if iterations < 1:
        raise SpecError("iterations", iterations, "at least 1")
    return build_schedule(
        plan.buckets,
        plan.microbatches,
        pp=plan.parallelism.pp,
        template=plan.template,
        steps=[iterations] * len(plan.htasks),
        instances=[htask.instance for htask in plan.htasks],
        co_scheduled=plan.orchestration.shares_clocks,
        carries=plan.carries,
        injection=plan.injection,
        in_flight=plan.in_flight,
    )
