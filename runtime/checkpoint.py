"""Checkpoints: every task at the same step, written while the schedule goes on.

In a continuous schedule the tasks reach step k at different moments, so each is copied at its own, and the
rank's file is written when all have got there. Replicas have the same state, so only the ranks of the first
one write. A checkpoint counts once their files exist:

    checkpoints/step-000010/rank-0.pt
    checkpoints/step-000010/rank-1.pt
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TypedDict

import torch

from muxtune.files import write_atomically
from muxtune.plan import Plan
from runtime.losses import StepLoss
from runtime.tenant import Tenant, TenantSnapshot


class RankState(TypedDict):
    """Content of one rank's file."""

    tenants: dict[str, TenantSnapshot]
    losses: dict[str, list[tuple[int, float, int, float]]]
    """Fields of each :class:`StepLoss` of the steps so far; empty unless the rank has the last stage."""


class CheckpointWriter:
    """Writes one rank's checkpoints.

    Args:
        folder: ``checkpoints`` of the run.
        rank: Whose files.
        plan: For the tasks of each hTask.
        tenants: This rank's part of every task.
        losses: Grows with the run; copied into each checkpoint.
        every: Steps between checkpoints.
        steps: Of the run; the last needs no checkpoint, as the adapters themselves are written.
        done: Steps that a resumed run starts with.
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
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._plan = plan
        self._tenants = tenants
        self._losses = losses
        self._every = every
        self._steps = steps
        self._done = [min(done, own) for own in plan.htask_steps()]
        self._pending: dict[int, dict[str, TenantSnapshot]] = {}

    def after_step(self, htask: int, step: int) -> int | None:
        """Copy what has reached a checkpoint; write the checkpoint that is complete.

        Returns:
            Steps that the checkpoint written now stands for, if one was.
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
        losses = {
            task_id: [astuple(entry) for entry in entries if entry.step < k]
            for task_id, entries in self._losses.items()
        }
        state = RankState(tenants=snapshots, losses=losses)
        path = self._folder / _step_name(k) / _rank_name(self._rank)
        write_atomically(path, lambda temporary: torch.save(state, temporary))
        newest = newest_checkpoint(self._folder, writing_ranks(self._plan))
        if newest is not None:
            _remove_before(self._folder, newest)


def writing_ranks(plan: Plan) -> int:
    """Ranks whose files make a checkpoint: the first ones, which are the first replica."""
    return plan.parallelism.ranks // plan.parallelism.dp


def newest_checkpoint(folder: Path, ranks: int) -> int | None:
    """Steps that the newest checkpoint with the files of so many ranks stands for."""
    steps = [
        step
        for step, path in _checkpoints(folder)
        if all((path / _rank_name(rank)).is_file() for rank in range(ranks))
    ]
    return max(steps, default=None)


def load_rank_state(folder: Path, step: int, rank: int) -> RankState:
    """Read one rank's file of a complete checkpoint."""
    path = folder / _step_name(step) / _rank_name(rank)
    state: RankState = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in found if match]


def _remove_before(folder: Path, step: int) -> None:
    for other, path in _checkpoints(folder):
        if other < step:
            shutil.rmtree(path, ignore_errors=True)  # another rank may be removing it too


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _rank_name(rank: int) -> str:
    return f"rank-{rank}.pt"
