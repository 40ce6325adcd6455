"""Plays the action list of one stage."""

# T tokens of the micro-batch, D hidden size, K tasks that still train

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from muxtune.orchestration import clock_segments
from muxtune.plan import Plan
from muxtune.schedule import COMPUTE, Action, clocks_of
from muxtune.support.errors import MuxTuneError
from runtime.backbone.hugging_face import torch_dtype
from runtime.backbone.stage import Stage
from runtime.data.batch import MicrobatchTensors
from runtime.data.feed import Feed
from runtime.distributed.mesh import RankMesh
from runtime.distributed.peers import PeerLostError
from runtime.distributed.transport import Inbox, Outbox
from runtime.engine.meter import ActionMeter
from runtime.engine.overlap import Overlap
from runtime.engine.recorder import Recorder
from runtime.engine.relay import Body, RelayClosedError
from runtime.engine.stepper import Stepper
from runtime.tasks.losses import LossLedger


class StageRunner:
    """A stage of the pipeline, or one replica's shard of it, on one rank.

    Args:
        plan: Plan that has been checked.
        mesh: Place of the rank in the mesh.
        actions: All that this stage will do.
        feed: Deals out the replica's micro-batches.
        stages: The stage's copy of the backbone for each instance.
        ledger: Gets the losses of the micro-batches; on the last stage.
        stepper: Takes the optimizer steps.
        recorder: Gets the spans.
        meter: Counts what the actions hold.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: RankMesh,
        actions: Sequence[Action],
        *,
        feed: Feed,
        stages: Mapping[int, Stage],
        ledger: LossLedger,
        stepper: Stepper,
        recorder: Recorder,
        meter: ActionMeter,
    ) -> None:
        self._plan = plan
        self._mesh = mesh
        self._actions = actions
        self._feed = feed
        self._backbones = [stages[htask.instance] for htask in plan.htasks]
        self._ledger = ledger
        self._stepper = stepper
        self._recorder = recorder
        self._meter = meter
        self._left_out: dict[tuple[int, int], list[str]] = {}
        """Per hTask and step, tasks whose part of it cannot be computed here."""
        self._open: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._overlap = None
        if mesh.team is not None:
            mesh.team.noted = mesh.reports
            self._overlap = Overlap(mesh.team, partial(recorder.span, COMPUTE, turn=True), mesh.device)
        self._segments = lru_cache(maxsize=None)(partial(clock_segments, plan, mesh.stage))

    def run(self, origin_ns: int, elapsed_s: float = 0.0) -> None:
        """Play all actions.

        Args:
            origin_ns: Reading of ``time.perf_counter_ns`` that is the start of the run.
            elapsed_s: What the resumed run had taken before; added to the losses' times.

        Raises:
            NonFiniteError: The verdict on a step ends the run; on the rank that keeps the losses.
            PeerLostError: A neighbouring rank is gone, or tells of such a step.
        """
        self._recorder.begin(origin_ns, elapsed_s)
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
            self._stepper.settle(wait=True)
            for outbox in (self._to_next, self._to_previous):
                if outbox is not None:
                    outbox.flush()
        except PeerLostError:
            self._stepper.settle()  # it may be gone because it has heard of a verdict before us
            raise
        if self._overlap is not None:  # not after an error, when a body may hang that would be waited for
            self._overlap.close()
        self._recorder.settle(wait=True)

    def _sizes(self, kind: str) -> Iterator[int]:
        """Tokens of the messages to come, each found when it is asked for: tasks may leave until then."""
        m = self._plan.microbatches
        return (self._feed.tokens(a.htask, a.number // m[a.htask]) for a in self._actions if a.kind == kind)

    def _play(self, clock: Sequence[Action]) -> None:
        """Play a clock: as one where the plan has a launch order for it, else action by action."""
        if clock[0].kind == "STEP":
            for action in clock:
                self._stepper.step(action)
            return
        begin, end = (
            (self._begin_forward, self._end_forward)
            if clock[0].kind == "F"
            else (self._begin_backward, self._end_backward)
        )
        segments = self._segments("fwd" if clock[0].kind == "F" else "bwd", tuple(a.htask for a in clock))
        # While allocations are followed nobody else has a turn, or they would count as the other one's.
        if segments is None or self._overlap is None or any(map(self._meter.traces, clock)):
            for action in clock:
                body = begin(action)
                start = self._recorder.now()
                self._run_alone(action, body)
                end(action)
                self._recorder.span(COMPUTE, action, start)
            return
        self._overlap.play({action: begin(action) for action in clock}, segments)
        for action in clock:
            start = self._recorder.now()
            end(action)
            self._recorder.span(COMPUTE, action, start)

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
            self._stepper.settle(action.htask)  # may wait, which is no part of the forward
            return partial(self._forward, action, self._microbatch(action), None)
        self._stepper.settle()
        if self._stepper.awaits(action.htask):
            batch, hidden_TD = self._recorder.wait(
                action, partial(self._verdict_and_arrival, self._activations, action)
            )
        else:
            batch = self._microbatch(action)
            hidden_TD = self._recorder.wait(action, self._activations.receive)
        return partial(self._forward, action, batch, hidden_TD.requires_grad_())

    def _microbatch(self, action: Action) -> MicrobatchTensors:
        start = self._recorder.now()
        batch = self._feed.microbatch(action.htask, action.number, without=self._faulty(action))
        self._recorder.span(COMPUTE, action, start)
        return batch

    def _faulty(self, action: Action) -> list[str]:
        """Tasks that could not be computed in an earlier micro-batch of the step."""
        return self._left_out.get((action.htask, action.number // self._plan.microbatches[action.htask]), [])

    def _verdict_and_arrival(self, activations: Inbox, action: Action) -> tuple[MicrobatchTensors, Tensor]:
        """A forward's micro-batch, which has no task that has failed by now, and its input.

        Stage 0 knows the verdict before it begins this forward, so it comes before the input.
        """
        self._stepper.settle(action.htask)
        return self._feed.microbatch(action.htask, action.number), activations.receive()

    def _forward(self, action: Action, batch: MicrobatchTensors, hidden_TD: Tensor | None) -> None:
        backbone = self._backbones[action.htask]
        self._meter.note_messages(self._message_bytes())
        with self._meter.forward(action, backbone) as counted:
            if not batch.spans:  # all its tasks have failed
                output = self._nothing(batch)
            else:
                batch, output = self._compute(action, batch, hidden_TD)
                if self._mesh.last:
                    output = self._ledger.add(action, output)
            if counted is not None:
                counted.hold(hidden_TD, output)
                self._meter.follow(action, batch.attention.carried)
        self._open[action.htask, action.number] = (hidden_TD, output)

    def _compute(
        self, action: Action, batch: MicrobatchTensors, hidden_TD: Tensor | None
    ) -> tuple[MicrobatchTensors, Tensor]:
        """A forward; without the tasks, if there are some, that it cannot be done for.

        Returns:
            The micro-batch as it was computed, and its output.
        """
        backbone = self._backbones[action.htask]
        try:
            return batch, backbone.forward(batch, hidden_TD)
        except (MuxTuneError, RelayClosedError, torch.AcceleratorError):
            raise  # nobody's in particular
        except Exception:
            culprits = self._culprits(action, batch, hidden_TD)
            if not culprits:
                raise
        m = self._plan.microbatches[action.htask]
        left_out = self._left_out[action.htask, action.number // m] = [*self._faulty(action), *culprits]
        for task_id, error in culprits.items():
            self._feed.faults.note(task_id, action.number // m, error)
        batch = self._feed.microbatch(action.htask, action.number, without=left_out)
        return batch, backbone.forward(batch, hidden_TD)

    def _culprits(
        self, action: Action, batch: MicrobatchTensors, hidden_TD: Tensor | None
    ) -> dict[str, Exception]:
        """Tasks whose part of a micro-batch cannot be computed even alone, and why.

        There are none if it cannot be computed without any task either. Shards of a stage go the same way, as
        long as they meet the same exceptions. In a carry group, what an interrupted forward has left to later
        ones cannot be taken back, so there are none.
        """
        if batch.attention.carried is not None or self._try(action, hidden_TD, batch.task_ids) is not None:
            return {}
        culprits: dict[str, Exception] = {}
        for span, task_id in zip(batch.spans, batch.task_ids, strict=True):
            others = [other for other in batch.task_ids if other != task_id]
            error = self._try(action, hidden_TD, others) if span.start < span.stop else None
            if error is not None:
                culprits[task_id] = error
        return culprits

    def _try(self, action: Action, hidden_TD: Tensor | None, without: Sequence[str]) -> Exception | None:
        """What a forward without some tasks ends with, if it fails."""
        batch = self._feed.microbatch(action.htask, action.number, without=without)
        try:
            with torch.no_grad():
                self._backbones[action.htask].forward(batch, hidden_TD)
        except (MuxTuneError, RelayClosedError, torch.AcceleratorError):
            raise
        except Exception as error:
            return error
        return None

    def _nothing(self, batch: MicrobatchTensors) -> Tensor:
        """What a forward of no task hands on."""
        model = self._plan.model
        return torch.zeros(
            len(batch.tokens_T), model.hidden, dtype=torch_dtype(model), device=batch.tokens_T.device
        )

    def _end_forward(self, action: Action) -> None:
        if self._to_next is not None:
            _, output = self._open[action.htask, action.number]
            self._to_next.send(output.detach())

    def _begin_backward(self, action: Action) -> Body:
        """Get what a backward needs.

        Returns:
            The backward.
        """
        gradient = None if self._gradients is None else self._recorder.wait(action, self._gradients.receive)
        return partial(self._backward, action, gradient)

    def _backward(self, action: Action, gradient: Tensor | None) -> None:
        _, output = self._open[action.htask, action.number]
        self._meter.note_messages(self._message_bytes() + (0 if gradient is None else gradient.nbytes))
        # A micro-batch may have no sequence at all, after a task with more of them has finished; it then
        # touches no adapter and has no graph, but its neighbours wait for a gradient all the same.
        if output.requires_grad:
            with self._meter.backward(action):
                torch.autograd.backward(output, gradient)

    def _end_backward(self, action: Action) -> None:
        hidden_TD, _ = self._open.pop((action.htask, action.number))
        if self._to_previous is not None:
            assert hidden_TD is not None
            sent_TD = torch.zeros_like(hidden_TD) if hidden_TD.grad is None else hidden_TD.grad
            self._to_previous.send(sent_TD)

    def _message_bytes(self) -> int:
        """Buffers of messages to come, and sent gradients; what is sent forward is kept for its backward."""
        inboxes = (self._activations, self._gradients)
        posted = sum(inbox.posted_bytes for inbox in inboxes if inbox is not None)
        return posted + (0 if self._to_previous is None else self._to_previous.kept_bytes)
