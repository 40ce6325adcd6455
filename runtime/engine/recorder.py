"""Records what a rank does: spans of its actions and waits, its collectives, and the losses of its steps."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from muxtune.schedule import COMMUNICATION, COMPUTE, Action, ActionSpan, OperatorSpan
from runtime.device.stopwatch import Mark
from runtime.distributed.mesh import RankMesh
from runtime.reports.footprint import MeasuredMemory
from runtime.reports.report import StageRecord
from runtime.tasks.losses import StepLoss

T = TypeVar("T")

TRACED_SPANS = 20_000
"""Spans of a rank after which an action's turns but the first are one span. With many layers, an action has
dozens of turns."""


class Recorder:
    """The record of one rank.

    Args:
        mesh: Place of the rank in the mesh; only the rank that reports for its stage keeps spans.
        microbatches: Micro-batches per hTask and step.
    """

    def __init__(self, mesh: RankMesh, microbatches: Sequence[int]) -> None:
        self._mesh = mesh
        self._microbatches = microbatches
        self._stopwatch = mesh.stopwatch
        self._elapsed_s = 0.0
        self._spans: list[ActionSpan] = []
        self._turns: dict[Action, ActionSpan] = {}
        """All turns of an action but the first, as long as they are together, up to the end of the last."""
        self._unread: deque[tuple[str, Action, Mark, Mark, bool]] = deque()
        """Spans whose marks may not have passed, and whether they are turns."""
        self.exposed_s: defaultdict[Action, float] = defaultdict(float)
        """How long all F, or B, of an hTask's step waited for sums over the stage's ranks, by the first."""
        self.losses: dict[str, list[StepLoss]] = defaultdict(list)
        """Per task id, of all replicas; on the last stage only."""

    def begin(self, origin_ns: int, elapsed_s: float) -> None:
        """Count from here.

        Args:
            origin_ns: Reading of ``time.perf_counter_ns`` that is the start of the run.
            elapsed_s: What the resumed run had taken before; added to :meth:`wall_s`.
        """
        self._stopwatch.begin(origin_ns)
        self._elapsed_s = elapsed_s

    def now(self) -> Mark:
        """Mark this moment of the work."""
        return self._stopwatch.now()

    def wall_s(self) -> float:
        """Seconds that the run has taken; stops the host until a GPU has come here."""
        return self._elapsed_s + self._stopwatch.seconds(self._stopwatch.now())

    def span(self, stream: str, action: Action, start: Mark, *, turn: bool = False) -> None:
        """Note that an action was busy on a stream up to now.

        Args:
            stream: Stream of the span.
            action: Action that it belongs to.
            start: Mark of its start.
            turn: It is one of many turns that the action has.
        """
        if self._mesh.reports:
            self._unread.append((stream, action, start, self._stopwatch.now(), turn))

    def wait(self, action: Action, receive: Callable[[], T]) -> T:
        """Result of a call that waits for other ranks, noted as communication of an action."""
        start = self._stopwatch.now()
        result = receive()
        self.span(COMMUNICATION, action, start)
        return result

    def settle(self, *, wait: bool = False) -> None:
        """Take over the spans and waits that have passed, or all."""
        watch = self._stopwatch
        watch.settle()
        while self._unread and (wait or watch.has_passed(self._unread[0][3])):
            stream, action, start, end, turn = self._unread.popleft()
            span = ActionSpan(self._mesh.stage, stream, action, watch.seconds(start), watch.seconds(end))
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
            first = action.number - action.number % self._microbatches[action.htask]
            self.exposed_s[replace(action, number=first)] += ns / 1e9

    @property
    def spans(self) -> list[ActionSpan]:
        """What the rank did and waited for, if it reports for its stage."""
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

    def record(self, memory: MeasuredMemory) -> StageRecord:
        """All of it, for the report of the run.

        Args:
            memory: What the rank held.
        """
        return StageRecord(
            spans=self.spans, memory=memory, operators=self.operators, exposed_s=self.exposed_s
        )
