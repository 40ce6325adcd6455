"""Whether the optimizer steps of an hTask's tasks may count: losses and gradients are sound on all ranks.

A step comes to a stage when its last backward is done, on the last stage first. No stage waits for the others
there, unless a task is clipped by the norm of its whole gradient. Each leaves a step out that its own
gradients would spoil, and tells the others. The verdict of all stages is waited for where something first
depends on the step: at the hTask's next forward, and before its losses, its checkpoint and its adapters are
written. It is there by then: a stage gets the activations of a forward only after all stages have come to
the step before it. A task whose verdict is bad has failed: it leaves the hTask before that forward, and what
the step did to its adapter on other stages is never read.
"""

# K tasks of an hTask that still train, S stages

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.support.errors import RunError
from runtime.distributed.mesh import RankMesh
from runtime.distributed.peers import PeerLostError, or_peer_lost
from runtime.distributed.teams import Team
from runtime.tasks.tenant import Tenant

TELL_WAIT_S = 2.0
"""How long ranks let the one that tells of a bad verdict go first."""


class NonFiniteError(RunError):
    """Something of a task's optimizer step is NaN, infinite or larger than the task allows."""

    def __init__(self, task_id: str, step: int, what: str, kept: str = "") -> None:
        super().__init__(task_id, step, what, kept)
        self.task_id = task_id
        self.step = step

    def __str__(self) -> str:
        task_id, step, what, kept = self.args
        return f"task {task_id}, step {step}: {what}" + (f"; {kept}" if kept else "")

    def keeping(self, kept: str) -> NonFiniteError:
        """This error with a word on what is left."""
        task_id, step, what, _ = self.args
        return NonFiniteError(task_id, step, what, kept)


def end_rank(mesh: RankMesh, error: NonFiniteError) -> None:
    """End this rank because of what all ranks know.

    Raises:
        NonFiniteError: On the rank that writes the tasks' losses.
        PeerLostError: On all others, a little later.
    """
    if mesh.last and mesh.reports:
        raise error
    time.sleep(TELL_WAIT_S)
    raise PeerLostError(f"the run is over, as another rank says: {error}")


class StepVerdict:
    """The verdict on one step of an hTask, from this rank's part of it on.

    Args:
        mesh: Place of the rank in the mesh.
        tenants: Tenants of the hTask, those that still train.
        squared_K: Squared gradient norms, of all shards of the stage.
        faults_K: Ranks of the stage that have met a fault of the task.
        nll_K: Sums of all replicas' losses; on the last stage.
    """

    def __init__(
        self,
        mesh: RankMesh,
        tenants: Sequence[Tenant],
        *,
        squared_K: Tensor,
        faults_K: Tensor,
        nll_K: Tensor | None,
    ) -> None:
        self._mesh = mesh
        self._tenants = tenants
        sound_K = [squared <= t.most_squared_norm for t, squared in zip(tenants, squared_K, strict=True)]
        self._table = squared_K.new_zeros((3 + mesh.stage_count, len(tenants)))
        """Squared norms; losses that are not finite; ranks that met a fault; whether each stage refuses:
        ``[3 + S, K]``."""
        self._table[0] = squared_K
        if nll_K is not None:
            self._table[1] = nll_K.masked_fill(nll_K.isfinite(), 0.0)
        self._table[2] = faults_K
        self._table[3 + mesh.stage] = ~torch.stack(sound_K)  # a NaN is at most nothing
        self._met = mesh.stages is None
        self._work: dist.Work | None = None

    @property
    def norms(self) -> Tensor:
        """Gradient norms ``[K]``, of all that has been added up so far."""
        return self._table[0].sqrt()

    @property
    def refused(self) -> Tensor:
        """Whether a task's step must leave no trace, ``[K]``, by all that has been added up so far."""
        squared_K = self._table[0]
        allowed_K = squared_K.isfinite()
        if any(tenant.task.abort_grad_norm is not None for tenant in self._tenants):
            pairs = zip(self._tenants, squared_K, strict=True)
            allowed_K = torch.stack([squared <= tenant.squared_limit for tenant, squared in pairs])
        return (self._table[1:] != 0).any(0) | ~allowed_K

    def meet(self, stages: Team) -> None:
        """Add up what all stages have, now."""
        stages.sum_(self._table)
        self._met = True

    def tell(self) -> None:
        """Begin to add up what all stages have, if they have not met; stops the host until a GPU is here."""
        if not self._met and self._mesh.verdicts is not None:
            self._table = self._table.cpu()
            self._work = self._mesh.verdicts.begin(self._table, dist.ReduceOp.SUM)

    def is_known(self) -> bool:
        """Whether :meth:`pronounce` would not wait for another rank."""
        return self._work is None or self._work.is_completed()

    def pronounce(self, words: Callable[[str], str]) -> dict[str, str]:
        """Wait for all stages.

        Args:
            words: What a rank has met, of a task by its id.

        Returns:
            What is wrong with a task's step, by its id; the same on all ranks.

        Raises:
            PeerLostError: Another rank is gone.
        """
        if self._work is not None and self._mesh.verdicts is not None:
            or_peer_lost(self._work.wait, self._mesh.verdicts.peer)
        squared_K, loss_K, faults_K, *refused_SK = self._table.tolist()
        faults: dict[str, str] = {}
        for k, tenant in enumerate(self._tenants):
            stages = [str(stage) for stage, refused_K in enumerate(refused_SK) if refused_K[k]]
            if faults_K[k]:
                faults[tenant.task.id] = words(tenant.task.id)
            elif loss_K[k] or stages or not squared_K[k] <= tenant.squared_limit:
                what = (
                    f"the loss is {loss_K[k]}" if loss_K[k] else _gradient_fault(tenant, squared_K[k], stages)
                )
                faults[tenant.task.id] = what
        return faults


def _gradient_fault(tenant: Tenant, squared: float, stages: Sequence[str]) -> str:
    norm, limit = squared**0.5, tenant.task.abort_grad_norm
    text = f"the gradient norm is {norm:.3g}"
    if limit is not None and limit < norm < math.inf:
        return f"{text}, above abort_grad_norm ({limit:g})"
    text += f" (stage {', '.join(stages)})" if stages else ""
    return f"{text}, too large for AdamW to square" if math.isfinite(norm) else text
