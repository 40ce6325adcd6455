"""Checkpoints of a run: each task has its own, written when it has done its step, while the schedule goes on.

Replicas have the same state, so only the ranks of the first one write, each its part of every task. Nothing
that is not finite is written. A run goes on from an iteration at which every task has a checkpoint: the two
newest of these are kept, and at least two of each task.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from muxtune.plan import Plan
from runtime.tasks.checkpoint_files import (
    DamagedCheckpointError,
    TaskState,
    check_task,
    checkpoint_folders,
    complete_steps,
    identity,
    load_task,
    save_part,
)
from runtime.tasks.losses import StepLoss
from runtime.tasks.outputs import CHECKPOINTS, load_status, task_folder
from runtime.tasks.tenant import Tenant, is_finite
from runtime.tasks.verdict import NonFiniteError

KEPT = 2
"""Checkpoints of each task that are kept; one that a disk has spoilt leaves another."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """The checkpoints of one task."""

    folder: Path
    identity: str
    steps: int
    """Steps of the task itself."""
    failed_at: int | None
    """Step that failed, and steps that it had done by then; None if none did."""
    failure: str
    """Why, in words."""

    def at(self, iteration: int) -> int | None:
        """Steps that it had done after an iteration; None if it had failed before."""
        if self.failed_at is not None and iteration > self.failed_at:
            return None
        return min(iteration, self.steps)


@dataclass(frozen=True, slots=True)
class WholeCheckpoint:
    """Where a run can go on."""

    iteration: int | None
    """Iterations that are done; None if there is no such checkpoint."""
    complaints: tuple[str, ...]
    """Why newer ones are not used."""
    damaged: tuple[Path, ...]
    """Folders of these."""


class RunCheckpoints:
    """The checkpoints of all tasks of a run.

    Args:
        run_dir: The run's folder.
        plan: Plan that is run, with these tasks and this backbone.
    """

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self._tasks: dict[str, _Kept] = {}
        for task in plan.tasks:
            status = load_status(run_dir, task.id)
            failed = status if status is not None and status.state == "failed" else None
            self._tasks[task.id] = _Kept(
                folder=task_folder(run_dir, task.id) / CHECKPOINTS,
                identity=identity(plan, task),
                steps=task.steps,
                failed_at=None if failed is None else failed.steps_done,
                failure="" if failed is None else failed.reason or "",
            )

    def iterations(self) -> list[int]:
        """Iterations at which all tasks have a complete checkpoint, ascending."""
        complete = {task_id: set(complete_steps(kept.folder)) for task_id, kept in self._tasks.items()}
        return [
            iteration
            for iteration in sorted(set().union(*complete.values()))
            if all(
                (step := kept.at(iteration)) is None or step in complete[task_id]
                for task_id, kept in self._tasks.items()
            )
        ]

    @property
    def newest(self) -> int | None:
        """The last of these iterations."""
        return max(self.iterations(), default=None)

    def whole(self) -> WholeCheckpoint:
        """The newest of these iterations whose files are what was written."""
        complaints: list[str] = []
        damaged: list[Path] = []
        for iteration in reversed(self.iterations()):
            before = len(complaints)
            for kept in self._tasks.values():
                step = kept.at(iteration)
                try:
                    if step is not None:
                        check_task(kept.folder, step, kept.identity)
                except DamagedCheckpointError as error:
                    complaints.append(str(error))
                    damaged += [path for found, path in checkpoint_folders(kept.folder) if found == step]
            if len(complaints) == before:
                return WholeCheckpoint(iteration, tuple(complaints), tuple(damaged))
        return WholeCheckpoint(None, tuple(complaints), tuple(damaged))

    def failed(self, iteration: int) -> dict[str, tuple[int, str]]:
        """Tasks that had failed before an iteration: the step that failed, and why."""
        return {
            task_id: (kept.failed_at, kept.failure)
            for task_id, kept in self._tasks.items()
            if kept.failed_at is not None and kept.at(iteration) is None
        }

    def load(self, task_id: str, iteration: int) -> TaskState | None:
        """State of a task after an iteration; the last that was kept of one that had failed before.

        Returns:
            None if a failed task has no checkpoint: it is what it was at its start.

        Raises:
            DamagedCheckpointError: A file is missing, or not as it was written.
        """
        kept = self._tasks[task_id]
        step = kept.at(iteration)
        return self.last(task_id) if step is None else load_task(kept.folder, step, kept.identity)

    def last(self, task_id: str) -> TaskState | None:
        """State of a task in its newest checkpoint; None if it has none.

        Raises:
            DamagedCheckpointError: A file is not as it was written.
        """
        kept = self._tasks[task_id]
        step = max(complete_steps(kept.folder), default=None)
        return None if step is None else load_task(kept.folder, step, kept.identity)

    def remove_older(self, *, keep: int = KEPT) -> None:
        """Remove what is older than the newest ``keep``: of the run's, and of each task's own."""
        iterations = self.iterations()[-keep:]
        if not iterations:
            return
        for kept in self._tasks.values():
            own = complete_steps(kept.folder)[-keep:]
            for step, path in checkpoint_folders(kept.folder):
                if own and step < min(own[0], iterations[0]):
                    shutil.rmtree(path, ignore_errors=True)

    def clear_newer(self, iteration: int, damaged: Collection[Path] = ()) -> None:
        """Make room for the checkpoints after an iteration, whose files must not mix with those there.

        They will be written again. Damaged ones are kept as ``unused-*``.
        """
        for kept in self._tasks.values():
            for step, path in checkpoint_folders(kept.folder):
                if step <= iteration and path not in damaged:
                    continue
                if path in damaged:
                    aside = path.with_name(f"unused-{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                else:
                    shutil.rmtree(path)


class CheckpointWriter:
    """Writes one rank's parts.

    Args:
        run_dir: The run's folder.
        part: The rank's place in the first replica, whose ranks write.
        plan: Plan, which has the tasks of each hTask.
        tenants: This rank's part of every task.
        losses: Grows with the run; copied into each checkpoint.
        every: Steps between checkpoints.
        steps: Steps of the run; the last needs no checkpoint, as the adapters themselves are written.
        strict: Whether a state that is not finite ends the run. Else it is only not written: the next loss or
            the end of the run shows it on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        part: int,
        *,
        plan: Plan,
        tenants: Mapping[str, Tenant],
        losses: Mapping[str, Sequence[StepLoss]],
        every: int,
        steps: int,
        strict: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._part = part
        self._plan = plan
        self._tenants = tenants
        self._losses = losses
        self._every = every
        self._steps = steps
        self._strict = strict
        self._awaited: dict[int, set[int]] = {}
        """Per iteration with checkpoints, hTasks that have not come there and train until then."""

    def after_step(self, htask: int, step: int) -> list[str]:
        """Write the tasks of an hTask that have got to a checkpoint, or to their end, and have not failed.

        Returns:
            Ids of those that were written.

        Raises:
            NonFiniteError: A task's state is not finite.
        """
        done = step + 1
        if done >= self._steps:
            return []
        due = [
            task.id
            for task in self._plan.htask_tasks(htask)
            if self._tenants[task.id].failure is None
            and ((done < task.steps and done % self._every == 0) or done == task.steps)
        ]
        written = [task_id for task_id in due if self._write(task_id, done)]
        if done % self._every == 0:
            trains = {h for h, steps in enumerate(self._plan.htask_steps()) if steps >= done}
            awaited = self._awaited.setdefault(done, trains)
            awaited.discard(htask)
            if not awaited:
                del self._awaited[done]
                RunCheckpoints(self._run_dir, self._plan).remove_older()
        return written

    def _write(self, task_id: str, done: int) -> bool:
        tenant = self._tenants[task_id]
        snapshot = tenant.snapshot()
        if not is_finite(snapshot):
            if self._strict:
                raise NonFiniteError(task_id, done - 1, "adapter or optimizer state is not finite after it")
            return False
        save_part(
            task_folder(self._run_dir, task_id) / CHECKPOINTS,
            tenant,
            snapshot,
            identity=identity(self._plan, tenant.task),
            steps_done=done,
            part=self._part,
            parts=writing_ranks(self._plan),
            losses=[loss for loss in self._losses[task_id] if loss.step < done],
        )
        return True


def writing_ranks(plan: Plan) -> int:
    """Ranks whose parts make a checkpoint: the first ones, which are the first replica."""
    return plan.parallelism.ranks // plan.parallelism.dp
