"""Bytes that come and go on a stage while its actions are played."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from muxtune.memory.loads import HTaskLoad
from muxtune.schedule import Action

Clock = Sequence[Action]
"""Actions that run together, or a STEP."""

POSTED_AHEAD = 2
"""Receives that a stage posts per direction beyond the message that it works on, as the runtime does."""


class Variable(NamedTuple):
    """The part of :class:`StageMemory` that comes and goes, in bytes."""

    gradients: int = 0
    activations: int = 0
    logits: int = 0
    chunk_kv: int = 0
    messages: int = 0
    workspace: int = 0


def fullest_moment(
    htasks: Sequence[HTaskLoad], clocks: Sequence[Clock], *, first: bool, last: bool, sent_kept: int
) -> Variable:
    """What is there at the fullest moment of a stage's actions.

    Args:
        htasks: Of the plan.
        clocks: Actions of the stage, those that run together in one; a run repeats them.
        first: Nothing comes from a stage before, and no gradient goes there.
        last: Nothing goes to a stage behind.
        sent_kept: Sent gradients that are kept.
    """
    walk = _Walk(htasks, clocks, first=first, last=last, sent_kept=sent_kept)
    for clock in clocks:
        walk.play(clock)
    return walk.fullest


class _Walk:
    """A stage between two clocks."""

    def __init__(
        self,
        htasks: Sequence[HTaskLoad],
        clocks: Sequence[Clock],
        *,
        first: bool,
        last: bool,
        sent_kept: int,
    ) -> None:
        self._htasks = htasks
        self._sends_gradients, self._receives_gradients = not first, not last
        self._open: Counter[tuple[int, int]] = Counter()  # micro-batches per hTask and carry group
        self._activations = self._logits = self._chunk_kv = 0
        actions = list(chain.from_iterable(clocks))
        sent = [htasks[a.htask].message_bytes for a in actions if a.kind == "B"] if not first else []
        self._sent_gradients = deque(sent, maxlen=sent_kept)
        self._gradients: dict[int, int] = {}
        self._inboxes: dict[str, _Inbox] = {}
        for kind, receives in (("F", not first), ("B", not last)):
            sizes = [htasks[a.htask].message_bytes for a in actions if a.kind == kind]
            self._inboxes[kind] = _Inbox(sizes if receives else [0] * len(sizes))
        self.fullest = Variable()
        self._note()

    def play(self, clock: Clock) -> None:
        """Go one clock further."""
        kind, htasks = clock[0].kind, [self._htasks[action.htask] for action in clock]
        if kind == "STEP":
            self._gradients.pop(clock[0].htask, None)
            return
        for action, htask in zip(clock, htasks, strict=True):
            self._inboxes[kind].receive()
            if kind == "F":
                self._enter(action, htask)
        if kind == "F":
            self._note(sum(htask.forward_workspace_bytes for htask in htasks))
            return
        received = sum(htask.message_bytes for htask in htasks) * self._receives_gradients
        self._note(sum(htask.backward_workspace_bytes for htask in htasks), received)
        for action, htask in zip(clock, htasks, strict=True):
            self._leave(action, htask)
        self._note(0, received)

    def _enter(self, action: Action, htask: HTaskLoad) -> None:
        group = action.htask, action.number // htask.carry
        self._open[group] += 1
        if self._open[group] == 1:
            self._chunk_kv += htask.chunk_kv_bytes
        self._activations += htask.kept.activation_bytes
        self._logits += htask.kept.logit_bytes

    def _leave(self, action: Action, htask: HTaskLoad) -> None:
        group = action.htask, action.number // htask.carry
        self._open[group] -= 1
        if not self._open[group]:
            self._chunk_kv -= htask.chunk_kv_bytes
        self._activations -= htask.kept.activation_bytes
        self._logits -= htask.kept.logit_bytes
        self._gradients[action.htask] = htask.adapter_bytes
        self._sent_gradients.append(htask.message_bytes * self._sends_gradients)

    def _note(self, workspace: int = 0, received: int = 0) -> None:
        posted = sum(inbox.posted_bytes for inbox in self._inboxes.values())
        now = Variable(
            gradients=sum(self._gradients.values()),
            activations=self._activations,
            logits=self._logits,
            chunk_kv=self._chunk_kv,
            messages=posted + received + sum(self._sent_gradients),
            workspace=workspace,
        )
        if sum(now) > sum(self.fullest):
            self.fullest = now


class _Inbox:
    """Messages of one direction, over and over; the next few have their buffers already."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._next = 0
        self.posted_bytes = sum(sizes[i % len(sizes)] for i in range(POSTED_AHEAD) if sizes)

    def receive(self) -> None:
        """Take the next message and post one more receive."""
        ahead = (self._next + POSTED_AHEAD) % len(self._sizes)
        self.posted_bytes += self._sizes[ahead] - self._sizes[self._next % len(self._sizes)]
        self._next += 1
