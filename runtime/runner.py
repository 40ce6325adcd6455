"""Plays the action list of one stage."""

# T tokens of the micro-batch, D hidden size, K tasks that still train

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from muxtune.orchestration import clock_segments
from muxtune.plan import Plan
from muxtune.schedule import Action, clocks_of
from muxtune.trace import COMMUNICATION, COMPUTE, OperatorSpan, Span
from runtime.backbone import Stage, torch_dtype
from runtime.batch import MicrobatchTensors
from runtime.feed import Feed
from runtime.gradients import sum_over_replicas, sum_over_shards
from runtime.losses import LossLedger, StepLoss, step_losses
from runtime.mesh import RankMesh
from runtime.meter import ActionMeter
from runtime.overlap import Overlap
from runtime.relay import Body
from runtime.tenant import Tenant
from runtime.transport import Inbox, Outbox

T = TypeVar("T")


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
        self._stopwatch = mesh.stopwatch
        self._elapsed_s = 0.0
        self._open: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._ledger = LossLedger(feed, plan.microbatches)
        record = partial(self._record, COMPUTE)
        self._overlap = None if mesh.team is None else Overlap(mesh.team, record, mesh.device)
        self._segments = lru_cache(maxsize=None)(partial(clock_segments, plan, mesh.stage))
        self.spans: list[Span] = []
        self._unread: deque[tuple[str, Action, int, int]] = deque()
        """Spans whose marks may not have passed."""
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
            NonFiniteLossError: Of the first task that has one.
            PeerLostError: A neighbouring rank is gone.
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
        for clock in clocks_of(self._actions, self._plan.microbatches, self._plan.shared_buckets):
            self._play(clock)
        for outbox in (self._to_next, self._to_previous):
            if outbox is not None:
                outbox.flush()
        self._read_spans(wait=True)

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

    @property
    def exposed_s(self) -> dict[Action, float]:
        """How long actions waited for sums over the ranks of the stage."""
        team = self._mesh.team
        return {} if team is None else {action: ns / 1e9 for action, ns in team.exposed_ns.items()}

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
        if segments is None or self._overlap is None:
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
        start = self._stopwatch.now()
        batch = self._feed.microbatch(action.htask, action.number)
        self._record(COMPUTE, action, start)
        hidden_TD = None
        if self._activations is not None:
            hidden_TD = self._wait(action, self._activations.receive).requires_grad_()
        return partial(self._forward, action, batch, hidden_TD)

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
        losses = self._step_losses(action) if self._mesh.last else {}
        active = [tenant for tenant in self._tenants[h] if step < tenant.task.steps]
        self._sum_gradients(action, active)
        norms = self._gradient_norms(action, active)
        start = self._stopwatch.now()
        for tenant in active:
            tenant.step(step, norms.get(tenant.task.id))
        self._record(COMPUTE, action, start)
        *_, end = self._unread[-1]
        self._read_spans()
        wall_s = self._elapsed_s + (self._stopwatch.seconds(end) if losses else 0.0)
        for task_id, (loss, targets) in losses.items():
            self.losses[task_id].append(StepLoss(step, loss, targets, wall_s))
        self._on_step(h, step)

    def _step_losses(self, action: Action) -> dict[str, tuple[float, int]]:
        targets, nll_K = self._ledger.close(action)
        replicas = self._mesh.replicas
        if replicas is not None:
            self._wait(action, partial(replicas.sum_, nll_K))
        return step_losses(action.number, targets, nll_K, refuse=self._mesh.speaks)

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
        start = self._stopwatch.now()
        squared_K = torch.stack([t.squared_gradient_norm() for t in clipping])
        self._record(COMPUTE, action, start)
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
        start = self._stopwatch.now()
        result = receive()
        self._record(COMMUNICATION, action, start)
        return result

    def _record(self, stream: str, action: Action, start: int) -> None:
        self._unread.append((stream, action, start, self._stopwatch.now()))

    def _read_spans(self, *, wait: bool = False) -> None:
        """Take over the spans that have passed, or all."""
        watch = self._stopwatch
        watch.settle()
        while self._unread and (wait or watch.has_passed(self._unread[0][-1])):
            stream, action, start, end = self._unread.popleft()
            start_s, end_s = watch.seconds(start), watch.seconds(end)
            self.spans.append(Span(self._mesh.stage, stream, action, start_s, end_s))
        if self._mesh.team is not None:
            self._mesh.team.settle(wait=wait)
