"""Takes optimizer steps: sums of losses and gradients, norms, the step, and the verdict before it counts."""

# K tasks that still train

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from muxtune.schedule import COMPUTE, Action
from runtime.data.faults import Faults
from runtime.distributed.mesh import RankMesh
from runtime.engine.recorder import Recorder
from runtime.tasks.gradients import squared_gradient_norms, sum_over_replicas, sum_over_shards
from runtime.tasks.losses import LossLedger, StepLoss, step_losses
from runtime.tasks.tenant import Tenant
from runtime.tasks.verdict import StepVerdict


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """An optimizer step whose verdict is not there yet."""

    action: Action
    verdict: StepVerdict
    losses: dict[str, StepLoss]
    """Per task id; on the last stage only."""


class Stepper:
    """The optimizer steps of one rank.

    Args:
        mesh: Place of the rank in the mesh.
        tenants: Tenants of each hTask.
        ledger: Sums of the losses of steps that are under way.
        recorder: Gets the spans, and the losses of steps that count.
        faults: What this rank has met of tasks in the steps that are under way.
        on_fault: Called with task id, step and what is wrong with it, before ``on_step``; it may end the run.
        on_step: Called with hTask and step when an optimizer step counts, before the hTask goes on.
    """

    def __init__(
        self,
        mesh: RankMesh,
        tenants: Sequence[Sequence[Tenant]],
        ledger: LossLedger,
        recorder: Recorder,
        *,
        faults: Faults,
        on_fault: Callable[[str, int, str], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        self._mesh = mesh
        self._tenants = tenants
        self._ledger = ledger
        self._recorder = recorder
        self._faults = faults
        self._on_fault = on_fault
        self._on_step = on_step
        self._unsettled: deque[_Unsettled] = deque()
        """Steps that do not count yet, in order."""

    def step(self, action: Action) -> None:
        """Take a step of an hTask; it counts once it is settled.

        Raises:
            NonFiniteError: As :meth:`settle`.
            PeerLostError: As :meth:`settle`.
        """
        h, step, recorder = action.htask, action.number, self._recorder
        self.settle()
        active = [tenant for tenant in self._tenants[h] if step < tenant.stop]
        if not active:  # all have failed
            recorder.span(COMPUTE, action, recorder.now())
            self._on_step(h, step)
            return
        sums = self._step_sums(action) if self._mesh.last else None
        faults_K = self._sum_gradients(action, active)
        verdict = self._verdict(action, active, faults_K, None if sums is None else sums[1])
        start = recorder.now()
        for tenant, norm, refused in zip(active, verdict.norms, verdict.refused, strict=True):
            tenant.step(step, norm, refused)
        verdict.tell()
        recorder.span(COMPUTE, action, start)
        losses = {}
        if sums is not None:  # at the end, for it stops the host until a GPU has come here
            wall_s = recorder.wall_s()
            losses = {
                task_id: StepLoss(step, loss, targets, wall_s)
                for task_id, (loss, targets) in step_losses(*sums).items()
            }
        self._unsettled.append(_Unsettled(action, verdict, losses))
        if self._mesh.stages is None:
            self.settle(h)
        recorder.settle()

    def settle(self, htask: int | None = None, *, wait: bool = False) -> None:
        """Let the steps count whose verdicts are there, in order; tasks that they are bad for have failed.

        Args:
            htask: Wait for those up to its last one.
            wait: Wait for all.

        Raises:
            NonFiniteError: A verdict is bad and ends the run; on the rank that keeps the losses.
            PeerLostError: A verdict ends the run and another rank names it; or a neighbouring rank is gone.
        """
        pending = self._unsettled
        waited = len(pending) if wait else 0
        if htask is not None:
            waited = max((i + 1 for i, each in enumerate(pending) if each.action.htask == htask), default=0)
        while pending and (waited > 0 or pending[0].verdict.is_known()):
            waited -= 1
            settled = pending.popleft()
            faults = settled.verdict.pronounce(partial(self._faults.words, step=settled.action.number))
            for task_id, loss in settled.losses.items():
                if task_id not in faults:
                    self._recorder.losses[task_id].append(loss)
            for task_id, what in faults.items():
                self._on_fault(task_id, settled.action.number, what)
            self._on_step(settled.action.htask, settled.action.number)

    def awaits(self, htask: int) -> bool:
        """Whether the verdict on a step of an hTask is not there yet."""
        return any(each.action.htask == htask for each in self._unsettled)

    def _step_sums(self, action: Action) -> tuple[dict[str, int], Tensor]:
        """Targets per task id, and the sums ``[K]`` of all replicas."""
        targets, nll_K = self._ledger.close(action)
        replicas = self._mesh.replicas
        if replicas is not None:
            self._recorder.wait(action, partial(replicas.sum_, nll_K))
        return targets, nll_K

    def _sum_gradients(self, action: Action, active: Sequence[Tenant]) -> Tensor:
        """Give all ranks that hold a parameter its whole gradient, so that they step it alike.

        Returns:
            Replicas that have met a fault of each task, ``[K]``.
        """
        shards, replicas = self._mesh.shard.team, self._mesh.replicas
        met = self._faults.met([tenant.task.id for tenant in active], action.number)
        # In the adapters' usual dtype, which a message with gradients of it keeps.
        faults_K = torch.zeros(len(active), dtype=torch.float32, device=active[0].device)
        if any(met):
            faults_K += torch.tensor(met, device=faults_K.device)
        if shards is not None:
            self._recorder.wait(action, partial(sum_over_shards, active, shards))
        if replicas is not None:
            faults_K = self._recorder.wait(action, partial(sum_over_replicas, active, replicas, faults_K))
        return faults_K

    def _verdict(
        self, action: Action, active: Sequence[Tenant], faults_K: Tensor, nll_K: Tensor | None
    ) -> StepVerdict:
        """The verdict as far as it is needed for the step: with the other stages' part if a task clips."""
        recorder = self._recorder
        start = recorder.now()
        squared_K = squared_gradient_norms(active)
        faults_K = faults_K.to(squared_K.dtype)
        recorder.span(COMPUTE, action, start)
        shards = self._mesh.shard.team
        if shards is not None:
            both_2K = torch.stack([squared_K, faults_K])
            recorder.wait(action, partial(shards.sum_, both_2K))
            squared_K, faults_K = both_2K.unbind()
        start = recorder.now()
        verdict = StepVerdict(self._mesh, active, squared_K=squared_K, faults_K=faults_K, nll_K=nll_K)
        recorder.span(COMPUTE, action, start)
        if self._mesh.stages is not None and any(t.task.max_grad_norm is not None for t in active):
            recorder.wait(action, partial(verdict.meet, self._mesh.stages))
        return verdict
