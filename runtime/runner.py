"""Plays the action list of one stage."""

# T tokens of the micro-batch, D hidden size, K tasks that still train

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from muxtune.errors import RunError
from muxtune.plan import Plan
from muxtune.schedule import Action
from muxtune.trace import COMMUNICATION, COMPUTE, Span
from runtime.backbone import Stage, torch_dtype
from runtime.feed import Feed
from runtime.gradients import sum_over_replicas, sum_over_shards
from runtime.mesh import RankMesh
from runtime.meter import ActionMeter
from runtime.tenant import Tenant
from runtime.transport import Inbox, Outbox

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Loss of one optimizer step of one task."""

    step: int
    """From 0."""
    loss: float
    """Token-mean negative log-likelihood over the targets of the global batch, before the step."""
    target_tokens: int
    wall_s: float
    """Seconds from the start of the run to the end of the step on the last stage."""


class NonFiniteLossError(RunError):
    """A task's loss is NaN or infinite."""

    def __init__(self, task_id: str, step: int, loss: float) -> None:
        super().__init__(task_id, step, loss)
        self.task_id = task_id

    def __str__(self) -> str:
        task_id, step, loss = self.args
        return f"task {task_id}, step {step}: the loss is {loss}"


class StageRunner:
    """A stage of the pipeline, or one replica's shard of it, on one rank.

    Args:
        plan: Checked.
        mesh: Where the rank stands.
        actions: All that this stage will do.
        feed: Deals out the replica's micro-batches.
        stages: The stage's copy of the backbone for each instance.
        tenants: Of every task id.
        metered_steps: First steps of each hTask whose micro-batches' memory is counted.
        on_step: Called after each optimizer step with hTask and step.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: RankMesh,
        actions: Sequence[Action],
        *,
        feed: Feed,
        stages: Mapping[int, Stage],
        tenants: Mapping[str, Tenant],
        metered_steps: int = 1,
        on_step: Callable[[int, int], None],
    ) -> None:
        self._plan = plan
        self._mesh = mesh
        self._actions = actions
        self._feed = feed
        self._backbones = [stages[htask.instance] for htask in plan.htasks]
        self._tenants = [[tenants[task_id] for task_id in htask.task_ids] for htask in plan.htasks]
        self._on_step = on_step
        self._origin_ns = 0
        self._elapsed_s = 0.0
        self._open: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._targets: dict[tuple[int, int], dict[str, int]] = {}
        self._nll: dict[tuple[int, int], Tensor] = {}
        self.spans: list[Span] = []
        self.losses: dict[str, list[StepLoss]] = defaultdict(list)
        """Per task id, of all replicas; on the last stage only."""
        self.meter = ActionMeter(plan.microbatches, metered_steps)
        """What the actions held."""

    def run(self, origin_ns: int, elapsed_s: float = 0.0) -> None:
        """Play all actions.

        Args:
            origin_ns: Reading of ``time.perf_counter_ns`` that is the start of the run.
            elapsed_s: What the resumed run had taken before; added to the losses' times.

        Raises:
            NonFiniteLossError: Of the first task that has one.
            PeerLostError: A neighbouring rank is gone.
        """
        self._origin_ns = origin_ns
        self._elapsed_s = elapsed_s
        hidden, dtype = self._plan.model.hidden, torch_dtype(self._plan.model)
        mesh, open_limit = self._mesh, self._plan.open_limit
        previous, following = mesh.neighbour(mesh.stage - 1), mesh.neighbour(mesh.stage + 1)
        self._activations = None if mesh.first else Inbox(previous, self._sizes("F"), hidden, dtype)
        self._gradients = None if mesh.last else Inbox(following, self._sizes("B"), hidden, dtype)
        self._to_next = None if mesh.last else Outbox(following, room=open_limit(mesh.stage))
        self._to_previous = None if mesh.first else Outbox(previous, room=open_limit(mesh.stage - 1))
        play = {"F": self._forward, "B": self._backward, "STEP": self._step}
        for action in self._actions:
            play[action.kind](action)
        for outbox in (self._to_next, self._to_previous):
            if outbox is not None:
                outbox.flush()

    def _sizes(self, kind: str) -> list[int]:
        m = self._plan.microbatches
        return [self._feed.tokens(a.htask, a.number // m[a.htask]) for a in self._actions if a.kind == kind]

    def _forward(self, action: Action) -> None:
        h = action.htask
        start_ns = time.perf_counter_ns()
        batch = self._feed.microbatch(h, action.number)
        self._record(COMPUTE, action, start_ns)
        hidden_TD = None
        if self._activations is not None:
            hidden_TD = self._wait(action, self._activations.receive).requires_grad_()
        start_ns = time.perf_counter_ns()
        self.meter.note_messages(self._message_bytes())
        with self.meter.forward(action, self._backbones[h]) as counted:
            output = self._backbones[h].forward(batch, hidden_TD)
            if self._mesh.last:
                output = self._loss(action, output)
            if counted is not None:
                counted.hold(hidden_TD, output)
        self._open[h, action.number] = (hidden_TD, output)
        if self._to_next is not None:
            self._to_next.send(output.detach())
        self._record(COMPUTE, action, start_ns)

    def _loss(self, action: Action, nll_K: Tensor) -> Tensor:
        """Share of a micro-batch in the sum of all tasks' losses; their gradients do not touch."""
        step = action.number // self._plan.microbatches[action.htask]
        key = (action.htask, step)
        if key not in self._targets:
            self._targets[key] = self._feed.target_tokens(action.htask, step)
            self._nll[key] = torch.zeros(len(self._targets[key]), dtype=torch.float64)
        self._nll[key] += nll_K.detach()
        # A global batch whose sequences are all cut to their first token has nothing to learn: loss 0.
        targets_K = torch.tensor([max(n, 1) for n in self._targets[key].values()], dtype=nll_K.dtype)
        return (nll_K / targets_K).sum()

    def _backward(self, action: Action) -> None:
        hidden_TD, output = self._open.pop((action.htask, action.number))
        gradient = None if self._gradients is None else self._wait(action, self._gradients.receive)
        start_ns = time.perf_counter_ns()
        self.meter.note_messages(self._message_bytes() + (0 if gradient is None else gradient.nbytes))
        # A micro-batch may have no sequence at all, after a task with more of them has finished; it then
        # touches no adapter and has no graph, but its neighbours wait for a gradient all the same.
        if output.requires_grad:
            with self.meter.backward(action):
                torch.autograd.backward(output, gradient)
        if self._to_previous is not None:
            assert hidden_TD is not None
            sent_TD = torch.zeros_like(hidden_TD) if hidden_TD.grad is None else hidden_TD.grad
            self._to_previous.send(sent_TD)
        self._record(COMPUTE, action, start_ns)

    def _step(self, action: Action) -> None:
        h, step = action.htask, action.number
        losses = self._step_losses(action) if self._mesh.last else {}
        active = [tenant for tenant in self._tenants[h] if step < tenant.task.steps]
        self._sum_gradients(action, active)
        norms = self._gradient_norms(action, active)
        start_ns = time.perf_counter_ns()
        for tenant in active:
            tenant.step(step, norms.get(tenant.task.id))
        self._record(COMPUTE, action, start_ns)
        wall_s = self._elapsed_s + self.spans[-1].end_s
        for task_id, (loss, targets) in losses.items():
            self.losses[task_id].append(StepLoss(step, loss, targets, wall_s))
        self._on_step(h, step)

    def _step_losses(self, action: Action) -> dict[str, tuple[float, int]]:
        key = (action.htask, action.number)
        targets, nll_K = self._targets.pop(key), self._nll.pop(key)
        replicas = self._mesh.replicas
        if replicas is not None:
            self._wait(action, partial(replicas.sum_, nll_K))
        losses = {}
        for (task_id, n), nll in zip(targets.items(), nll_K.tolist(), strict=True):
            loss = nll / max(n, 1)
            # One rank says so, and it also writes the task's status; the others lose it and stop.
            if self._mesh.speaks and not math.isfinite(loss):
                raise NonFiniteLossError(task_id, action.number, loss)
            losses[task_id] = (loss, n)
        return losses

    def _sum_gradients(self, action: Action, active: Sequence[Tenant]) -> None:
        """Give all ranks that hold a parameter its whole gradient, so that they step it alike."""
        shards, replicas = self._mesh.shard.team, self._mesh.replicas
        if shards is not None:
            self._wait(action, partial(sum_over_shards, active, shards))
        if replicas is not None:
            self._wait(action, partial(sum_over_replicas, active, replicas))

    def _gradient_norms(self, action: Action, active: Sequence[Tenant]) -> dict[str, float]:
        """Global gradient norms of the tasks that clip, over all stages and shards."""
        clipping = [tenant for tenant in active if tenant.task.max_grad_norm is not None]
        if not clipping:
            return {}
        start_ns = time.perf_counter_ns()
        squared_K = torch.tensor([t.squared_gradient_norm() for t in clipping], dtype=torch.float64)
        self._record(COMPUTE, action, start_ns)
        for team in (self._mesh.shard.team, self._mesh.stages):
            if team is not None:
                self._wait(action, partial(team.sum_, squared_K))
        return dict(zip((t.task.id for t in clipping), squared_K.sqrt().tolist(), strict=True))

    def _message_bytes(self) -> int:
        """Buffers of messages to come, and sent gradients; what is sent forward is kept for its backward."""
        inboxes = (self._activations, self._gradients)
        posted = sum(inbox.posted_bytes for inbox in inboxes if inbox is not None)
        return posted + (0 if self._to_previous is None else self._to_previous.kept_bytes)

    def _wait(self, action: Action, receive: Callable[[], T]) -> T:
        start_ns = time.perf_counter_ns()
        result = receive()
        self._record(COMMUNICATION, action, start_ns)
        return result

    def _record(self, stream: str, action: Action, start_ns: int) -> None:
        end_ns = time.perf_counter_ns()
        start_s, end_s = (start_ns - self._origin_ns) / 1e9, (end_ns - self._origin_ns) / 1e9
        self.spans.append(Span(self._mesh.stage, stream, action, start_s, end_s))
