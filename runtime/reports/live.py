"""Writes how far the tasks of a run are while it goes on: on the one rank that has their losses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from muxtune.plan import Plan
from muxtune.support.progress import RunProgress, TaskProgress, save_progress_file
from runtime.data.feed import Feed
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant

WRITTEN_EVERY_S = 2.0
"""Writing it takes milliseconds, in which the rank does nothing else."""

PACE_STEPS = 10
"""Last steps of a task that its pace is taken from."""


class LiveProgress:
    """``progress.json`` of a run.

    Args:
        run_dir: The run's folder.
        plan: Plan that is run.
        feed: Knows the tokens of every step.
        tenants: Tenants by task id.
        losses: Grows with the run.
        first_step: Iterations that were done before this start.
        steps: Iterations of the whole run.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        feed: Feed,
        tenants: Mapping[str, Tenant],
        losses: Mapping[str, Sequence[StepLoss]],
        *,
        first_step: int,
        steps: int,
    ) -> None:
        self._run_dir = run_dir
        self._plan = plan
        self._feed = feed
        self._tenants = tenants
        self._losses = losses
        self._first_step = first_step
        self._steps = steps
        self._tokens: dict[str, list[int]] = {task.id: [] for task in plan.tasks}
        """Effective tokens of each step of this start."""
        self._written_s = float("-inf")

    def write(self, *, now: bool = False) -> None:
        """Write it, if that is :data:`WRITTEN_EVERY_S` ago, or now."""
        monotonic_s = time.monotonic()
        if not now and monotonic_s - self._written_s < WRITTEN_EVERY_S:
            return
        self._written_s = monotonic_s
        save_progress_file(self.progress(), self._run_dir)

    def progress(self) -> RunProgress:
        """How far all tasks are."""
        tasks = [self._task(task_id) for task_id in self._tokens]
        total = sum(task.effective_tokens_per_s or 0.0 for task in tasks)
        shares = (
            task.effective_tokens_per_s / total if task.effective_tokens_per_s else None for task in tasks
        )
        wall_s = max((own[-1].wall_s for own in self._losses.values() if own), default=0.0)
        return RunProgress(
            wall_s=wall_s,
            written_s=time.time(),
            tasks=tuple(
                task.model_copy(update={"share": share}) for task, share in zip(tasks, shares, strict=True)
            ),
        )

    def _task(self, task_id: str) -> TaskProgress:
        tenant, losses = self._tenants[task_id], self._losses.get(task_id, ())
        own = [loss for loss in losses if loss.step >= self._first_step]
        tokens = self._tokens[task_id]
        tokens += [self._feed.effective_tokens(task_id, loss.step) for loss in own[len(tokens) :]]
        steps = min(self._steps, tenant.task.steps)
        trains = tenant.failure is None and len(losses) < steps
        pace = own[-1 - PACE_STEPS :]
        per_s = eta_s = None
        if trains and len(pace) > 1:
            seconds = max(pace[-1].wall_s - pace[0].wall_s, 1e-9)
            per_s = sum(tokens[1 - len(pace) :]) / seconds
            eta_s = seconds / (len(pace) - 1) * (steps - len(losses))
        return TaskProgress(
            id=task_id,
            method=tenant.task.peft.method,
            state="failed" if tenant.failure is not None else "running" if trains else "finished",
            steps_done=len(losses),
            steps=steps,
            loss=losses[-1].loss if losses else None,
            effective_tokens=sum(tokens),
            effective_tokens_per_s=per_s,
            share=None,
            eta_s=eta_s,
            reason=tenant.failure,
        )
