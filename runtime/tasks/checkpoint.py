"""Checkpoints: every task at the same step, written while the schedule goes on.

In a continuous schedule the tasks reach step k at different moments, so each is copied at its own, and the
rank's file is written when all have got there. Replicas have the same state, so only the ranks of the first
one write. Nothing that is not finite is written, and the two newest complete checkpoints are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from muxtune.plan import Plan
from runtime.tasks.checkpoint_files import (
    RankState,
    load_rank_state,
    newest_checkpoint,
    remove_older,
    save_rank_state,
)
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant, TenantSnapshot, is_finite
from runtime.tasks.verdict import NonFiniteError

__all__ = ["KEPT", "CheckpointWriter", "load_rank_state", "newest_checkpoint", "writing_ranks"]

KEPT = 2
"""Complete checkpoints that are kept; one that a disk has spoilt leaves another."""


class CheckpointWriter:
    """Writes one rank's checkpoints.

    Args:
        folder: ``checkpoints`` of the run.
        rank: Rank whose files it writes.
        plan: Plan, which has the tasks of each hTask.
        tenants: This rank's part of every task.
        losses: Grows with the run; copied into each checkpoint.
        every: Steps between checkpoints.
        steps: Steps of the run; the last needs no checkpoint, as the adapters themselves are written.
        done: Steps that a resumed run starts with.
        digest: Digest of the plan; a checkpoint is of use to no other.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        plan: Plan,
        tenants: Mapping[str, Tenant],
        losses: Mapping[str, Sequence[StepLoss]],
        every: int,
        steps: int,
        done: int = 0,
        digest: str = "",
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._plan = plan
        self._tenants = tenants
        self._losses = losses
        self._every = every
        self._steps = steps
        self._digest = digest
        self._done = [min(done, own) for own in plan.htask_steps()]
        self._pending: dict[int, dict[str, TenantSnapshot]] = {}

    def after_step(self, htask: int, step: int) -> int | None:
        """Copy what has reached a checkpoint; write the checkpoint that is complete.

        Returns:
            Steps that the checkpoint written now stands for, if one was.

        Raises:
            NonFiniteError: A tenant's state is not finite; its checkpoint is not written.
        """
        self._done[htask] = done = step + 1
        if done % self._every == 0 and done < self._steps:
            self._pending.setdefault(done, {}).update(self._snapshots(htask))
        for k in sorted(self._pending):
            if all(d >= min(k, own) for d, own in zip(self._done, self._plan.htask_steps(), strict=True)):
                self._write(k, self._pending.pop(k))
                return k
        return None

    def _snapshots(self, htask: int) -> dict[str, TenantSnapshot]:
        return {task_id: self._tenants[task_id].snapshot() for task_id in self._plan.htasks[htask].task_ids}

    def _write(self, k: int, snapshots: dict[str, TenantSnapshot]) -> None:
        for htask in self._plan.htasks:
            if htask.task_ids[0] not in snapshots:  # finished before step k, and unchanged since
                snapshots |= self._snapshots(htask.id)
        for task_id, snapshot in snapshots.items():
            if not is_finite(snapshot):
                raise NonFiniteError(task_id, k - 1, "adapter or optimizer state is not finite after it")
        losses = {
            task_id: [astuple(entry) for entry in entries if entry.step < k]
            for task_id, entries in self._losses.items()
        }
        state = RankState(tenants=snapshots, losses=losses)
        save_rank_state(self._folder, state, plan=self._digest, step=k, rank=self._rank)
        remove_older(self._folder, writing_ranks(self._plan), keep=KEPT)


def writing_ranks(plan: Plan) -> int:
    """Ranks whose files make a checkpoint: the first ones, which are the first replica."""
    return plan.parallelism.ranks // plan.parallelism.dp
