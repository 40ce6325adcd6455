"""Plays the action list of one stage."""

# T tokens of the micro-batch, D hidden size, K tasks that still train

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from muxtune.orchestration import clock_segments
from muxtune.plan import Plan
from muxtune.schedule import COMMUNICATION, COMPUTE, Action, OperatorSpan, Span, clocks_of
from runtime.backbone.hugging_face import torch_dtype
from runtime.backbone.stage import Stage
from runtime.data.batch import MicrobatchTensors
from runtime.data.feed import Feed
from runtime.device.stopwatch import Mark
from runtime.distributed.mesh import RankMesh
from runtime.distributed.peers import PeerLostError
from runtime.distributed.transport import Inbox, Outbox
from runtime.engine.meter import ActionMeter
from runtime.engine.overlap import Overlap
from runtime.engine.relay import Body
from runtime.tasks.gradients import sum_over_replicas, sum_over_shards
from runtime.tasks.losses import LossLedger, StepLoss, step_losses
from runtime.tasks.tenant import Tenant
from runtime.tasks.verdict import StepVerdict

T = TypeVar("T")

TRACED_SPANS = 20_000
"""Spans of a rank after which an action's turns but the first are one span. With many layers, an action has
dozens of turns."""


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """An optimizer step whose verdict is not there yet."""

    action: Action
    verdict: StepVerdict
    losses: dict[str, StepLoss]
    """Per task id; on the last stage only."""


class StageRunner:
    """A stage of the pipeline, or one replica's shard of it, on one rank.

    Args:
        plan: Plan that has been checked.
        mesh: Place of the rank in the mesh.
        actions: All that this stage will do.
        feed: Deals out the replica's micro-batches.
        stages: The stage's copy of the backbone for each instance.
        tenants: Tenants by task id, every task.
        metered_steps: First steps of each hTask whose micro-batches' memory is counted.
        on_step: Called with hTask and step when an optimizer step counts, before the hTask goes on.
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
        self._stopwatch = mesh.stopwatch
        self._elapsed_s = 0.0
        self._open: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._unsettled: deque[_Unsettled] = deque()
        """Steps that do not count yet, in order."""
        self._ledger = LossLedger(feed, plan.microbatches)
        self._overlap = None
        if mesh.team is not None:
            mesh.team.noted = mesh.reports
            self._overlap = Overlap(mesh.team, partial(self._record, COMPUTE, turn=True), mesh.device)
        self._segments = lru_cache(maxsize=None)(partial(clock_segments, plan, mesh.stage))
        self._spans: list[Span] = []
        self._turns: dict[Action, Span] = {}
        """All turns of an action but the first, as long as they are together, up to the end of the last."""
        self._unread: deque[tuple[str, Action, Mark, Mark, bool]] = deque()
        """Spans whose marks may not have passed, and whether they are turns."""
        self.exposed_s: defaultdict[Action, float] = defaultdict(float)
        """How long all F, or B, of an hTask's step waited for sums over the stage's ranks, by the first."""
        self.losses: dict[str, list[StepLoss]] = defaultdict(list)
        """Per task id, of all replicas; on the last stage only."""
        self.meter = ActionMeter(plan.microbatches, metered_steps, mesh.device.memory_trace)
        """What the actions held."""

    def run(self, origin_ns: int, elapsed_s: float = 0.0) -> None:
        """Play all actions.

        Args:
            origin_ns: Reading of ``time.perf_counter_ns`` that is the start of the run.
            elapsed_s: What the resumed run had taken before; added to the losses' times.

        Raises:
            NonFiniteError: A loss or a gradient of a step is not finite; on the rank that keeps the losses.
            PeerLostError: A neighbouring rank is gone, or tells of such a step.
        """
        self._stopwatch.begin(origin_ns)
        self._elapsed_s = elapsed_s
        hidden, dtype = self._plan.model.hidden, torch_dtype(self._plan.model)
        mesh, open_limit = self._mesh, self._plan.open_limit
        previous, following = mesh.stage - 1, mesh.stage + 1
        self._activations = self._gradients = self._to_next = self._to_previous = None
        if not mesh.first:
            self._activations = Inbox(mesh.link("F", previous), self._sizes("F"), hidden, dtype)
            self._to_previous = Outbox(mesh.link("B", previous), room=open_limit(previous))
        if not mesh.last:
            self._gradients = Inbox(mesh.link("B", following), self._sizes("B"), hidden, dtype)
            self._to_next = Outbox(mesh.link("F", following), room=open_limit(mesh.stage))
        try:
            for clock in clocks_of(self._actions, self._plan.microbatches, self._plan.shared_buckets):
                self._play(clock)
            self._settle(wait=True)
            for outbox in (self._to_next, self._to_previous):
                if outbox is not None:
                    outbox.flush()
        except PeerLostError:
            self._settle()  # it may be gone because it has heard of a verdict before us
            raise
        if self._overlap is not None:  # not after an error, when a body may hang that would be waited for
            self._overlap.close()
        self._read_spans(wait=True)

    @property
    def spans(self) -> list[Span]:
        """What the rank did and waited for, if it speaks for its stage."""
        return [*self._spans, *self._turns.values()]

    @property
    def operators(self) -> list[OperatorSpan]:
        """Sums over the ranks of the stage, as long as they are traced, and the waits for them."""
        team, stage = self._mesh.team, self._mesh.stage
        spans = []
        for action, *from_marks, done in team.collectives if team is not None else ():
            for stream, label, start in zip(
                (COMMUNICATION, COMPUTE), ("all_reduce", "wait"), from_marks, strict=True
            ):
                start_s, end_s = self._stopwatch.seconds(start), self._stopwatch.seconds(done)
                spans.append(OperatorSpan(stage, stream, action, label, "communication", start_s, end_s))
        return spans

    def _sizes(self, kind: str) -> list[int]:
        m = self._plan.microbatches
        return [self._feed.tokens(a.htask, a.number // m[a.htask]) for a in self._actions if a.kind == kind]

    def _play(self, clock: Sequence[Action]) -> None:
        """Play a clock: as one where the plan has a launch order for it, else action by action."""
        if clock[0].kind == "STEP":
            for action in clock:
                self._step(action)
            return
        begin, end = (
            (self._begin_forward, self._end_forward)
            if clock[0].kind == "F"
            else (self._begin_backward, self._end_backward)
        )
        segments = self._segments("fwd" if clock[0].kind == "F" else "bwd", tuple(a.htask for a in clock))
        # While allocations are followed nobody else has a turn, or they would count as the other one's.
        if segments is None or self._overlap is None or any(map(self.meter.traces, clock)):
            for action in clock:
                body = begin(action)
                start = self._stopwatch.now()
                self._run_alone(action, body)
                end(action)
                self._record(COMPUTE, action, start)
            return
        self._overlap.play({action: begin(action) for action in clock}, segments)
        for action in clock:
            start = self._stopwatch.now()
            end(action)
            self._record(COMPUTE, action, start)

    def _run_alone(self, action: Action, body: Body) -> None:
        team = self._mesh.team
        if team is None:
            body()
            return
        team.action = action
        body()
        team.action = None

    def _begin_forward(self, action: Action) -> Body:
        """Get what a forward needs.

        Returns:
            The forward.
        """
        if self._activations is None:
            self._settle(action.htask)  # may wait, which is no part of the forward
        start = self._stopwatch.now()
        batch = self._feed.microbatch(action.htask, action.number)
        self._record(COMPUTE, action, start)
        hidden_TD = None
        if self._activations is not None:
            hidden_TD = self._wait(action, partial(self._arrival, self._activations, action)).requires_grad_()
        return partial(self._forward, action, batch, hidden_TD)

    def _arrival(self, activations: Inbox, action: Action) -> Tensor:
        """A forward's input; verdicts before it are known by then, as stage 0 settled before it sent one."""
        hidden_TD = activations.receive()
        self._settle(action.htask)
        return hidden_TD

    def _forward(self, action: Action, batch: MicrobatchTensors, hidden_TD: Tensor | None) -> None:
        backbone = self._backbones[action.htask]
        self.meter.note_messages(self._message_bytes())
        with self.meter.forward(action, backbone) as counted:
            output = backbone.forward(batch, hidden_TD)
            if self._mesh.last:
                output = self._ledger.add(action, output)
            if counted is not None:
                counted.hold(hidden_TD, output)
                self.meter.follow(action, batch.attention.carried)
        self._open[action.htask, action.number] = (hidden_TD, output)

    def _end_forward(self, action: Action) -> None:
        if self._to_next is not None:
            _, output = self._open[action.htask, action.number]
            self._to_next.send(output.detach())

    def _begin_backward(self, action: Action) -> Body:
        """Get what a backward needs.

        Returns:
            The backward.
        """
        gradient = None if self._gradients is None else self._wait(action, self._gradients.receive)
        return partial(self._backward, action, gradient)

    def _backward(self, action: Action, gradient: Tensor | None) -> None:
        _, output = self._open[action.htask, action.number]
        self.meter.note_messages(self._message_bytes() + (0 if gradient is None else gradient.nbytes))
        # A micro-batch may have no sequence at all, after a task with more of them has finished; it then
        # touches no adapter and has no graph, but its neighbours wait for a gradient all the same.
        if output.requires_grad:
            with self.meter.backward(action):
                torch.autograd.backward(output, gradient)

    def _end_backward(self, action: Action) -> None:
        hidden_TD, _ = self._open.pop((action.htask, action.number))
        if self._to_previous is not None:
            assert hidden_TD is not None
            sent_TD = torch.zeros_like(hidden_TD) if hidden_TD.grad is None else hidden_TD.grad
            self._to_previous.send(sent_TD)

    def _step(self, action: Action) -> None:
        h, step = action.htask, action.number
        self._settle()
        sums = self._step_sums(action) if self._mesh.last else None
        active = [tenant for tenant in self._tenants[h] if step < tenant.task.steps]
        self._sum_gradients(action, active)
        verdict = self._verdict(action, active, None if sums is None else sums[1])
        start = self._stopwatch.now()
        for tenant, norm, refused in zip(active, verdict.norms, verdict.refused, strict=True):
            tenant.step(step, norm, refused)
        verdict.tell()
        self._record(COMPUTE, action, start)
        losses = {}
        if sums is not None:  # at the end, for it stops the host until a GPU has come here
            wall_s = self._elapsed_s + self._stopwatch.seconds(self._stopwatch.now())
            losses = {
                task_id: StepLoss(step, loss, targets, wall_s)
                for task_id, (loss, targets) in step_losses(*sums).items()
            }
        self._unsettled.append(_Unsettled(action, verdict, losses))
        if self._mesh.stages is None:
            self._settle(h)
        self._read_spans()

    def _settle(self, htask: int | None = None, *, wait: bool = False) -> None:
        """Let the steps count whose verdicts are there, in order.

        Args:
            htask: Wait for those up to its last one.
            wait: Wait for all.
        """
        pending = self._unsettled
        waited = len(pending) if wait else 0
        if htask is not None:
            waited = max((i + 1 for i, each in enumerate(pending) if each.action.htask == htask), default=0)
        while pending and (waited > 0 or pending[0].verdict.is_known()):
            waited -= 1
            settled = pending.popleft()
            settled.verdict.pronounce()
            for task_id, loss in settled.losses.items():
                self.losses[task_id].append(loss)
            self._on_step(settled.action.htask, settled.action.number)

    def _step_sums(self, action: Action) -> tuple[dict[str, int], Tensor]:
        """Targets per task id, and the sums ``[K]`` of all replicas."""
        targets, nll_K = self._ledger.close(action)
        replicas = self._mesh.replicas
        if replicas is not None:
            self._wait(action, partial(replicas.sum_, nll_K))
        return targets, nll_K

    def _sum_gradients(self, action: Action, active: Sequence[Tenant]) -> None:
        """Give all ranks that hold a parameter its whole gradient, so that they step it alike."""
        shards, replicas = self._mesh.shard.team, self._mesh.replicas
        if shards is not None:
            self._wait(action, partial(sum_over_shards, active, shards))
        if replicas is not None:
            self._wait(action, partial(sum_over_replicas, active, replicas))

    def _verdict(self, action: Action, active: Sequence[Tenant], nll_K: Tensor | None) -> StepVerdict:
        """The verdict as far as it is needed for the step: with the other stages' part if a task clips."""
        start = self._stopwatch.now()
        squared_K = torch.stack([tenant.squared_gradient_norm() for tenant in active])
        self._record(COMPUTE, action, start)
        shards = self._mesh.shard.team
        if shards is not None:
            self._wait(action, partial(shards.sum_, squared_K))
        start = self._stopwatch.now()
        verdict = StepVerdict(self._mesh, action.number, active, squared_K=squared_K, nll_K=nll_K)
        self._record(COMPUTE, action, start)
        if self._mesh.stages is not None and any(t.task.max_grad_norm is not None for t in active):
            self._wait(action, partial(verdict.meet, self._mesh.stages))
        return verdict

    def _message_bytes(self) -> int:
        """Buffers of messages to come, and sent gradients; what is sent forward is kept for its backward."""
        inboxes = (self._activations, self._gradients)
        posted = sum(inbox.posted_bytes for inbox in inboxes if inbox is not None)
        return posted + (0 if self._to_previous is None else self._to_previous.kept_bytes)

    def _wait(self, action: Action, receive: Callable[[], T]) -> T:
        start = self._stopwatch.now()
        result = receive()
        self._record(COMMUNICATION, action, start)
        return result

    def _record(self, stream: str, action: Action, start: Mark, *, turn: bool = False) -> None:
        if self._mesh.reports:
            self._unread.append((stream, action, start, self._stopwatch.now(), turn))

    def _read_spans(self, *, wait: bool = False) -> None:
        """Take over the spans that have passed, or all."""
        watch = self._stopwatch
        watch.settle()
        while self._unread and (wait or watch.has_passed(self._unread[0][3])):
            stream, action, start, end, turn = self._unread.popleft()
            span = Span(self._mesh.stage, stream, action, watch.seconds(start), watch.seconds(end))
            if turn and len(self._spans) >= TRACED_SPANS:
                others = self._turns.get(action)
                if others is not None:
                    self._turns[action] = replace(span, start_s=span.start_s - others.duration_s)
                    continue
                self._turns[action] = replace(span, start_s=span.end_s)  # none yet; the first has the start
            self._spans.append(span)
        if self._mesh.team is None:
            return
        for action, ns in self._mesh.team.settle(wait=wait).items():
            first = action.number - action.number % self._plan.microbatches[action.htask]
            self.exposed_s[replace(action, number=first)] += ns / 1e9
