"""Bytes that come and go on a stage while its actions are played."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from muxtune.memory.htask_bytes import HTaskLoad, MicrobatchLoad
from muxtune.schedule import Action, ClockActions

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
    htasks: Sequence[HTaskLoad],
    clocks: Sequence[ClockActions],
    *,
    first: bool,
    last: bool,
    sent_kept: int,
    give_up_bytes: float = math.inf,
) -> Variable:
    """What is there at the fullest moment of a stage's actions.

    Args:
        htasks: Loads of the plan's hTasks.
        clocks: Actions of the stage, those that run together in one; a run repeats them.
        first: Nothing comes from a stage before, and no gradient goes there.
        last: Nothing goes to a stage behind.
        sent_kept: Sent gradients that are kept.
        give_up_bytes: A moment with more than these is answered with, though a fuller one may come.
    """
    walk = _Walk(htasks, clocks, first=first, last=last, sent_kept=sent_kept)
    for clock in clocks:
        walk.play(clock)
        if walk.most_bytes > give_up_bytes:
            break
    return walk.fullest


class _Walk:
    """A stage between two clocks. Every sum is kept up to date: searches walk thousands of schedules."""

    def __init__(
        self,
        htasks: Sequence[HTaskLoad],
        clocks: Sequence[ClockActions],
        *,
        first: bool,
        last: bool,
        sent_kept: int,
    ) -> None:
        self._htasks = htasks
        self._sends_gradients, self._receives_gradients = not first, not last
        self._activations = self._logits = self._chunk_kv = 0
        actions = list(chain.from_iterable(clocks))
        sent = [htasks[a.htask].message_bytes for a in actions if a.kind == "B"] if not first else []
        self._sent = deque(sent[-sent_kept:] if sent_kept else ())
        self._sent_kept = sent_kept
        self._sent_bytes = sum(self._sent)
        self._stepping: set[int] = set()
        """hTasks whose adapters have gradients."""
        self._gradient_bytes = 0
        self._inboxes: dict[str, _Inbox] = {}
        for kind, receives in (("F", not first), ("B", not last)):
            sizes = [htasks[a.htask].message_bytes for a in actions if a.kind == kind]
            self._inboxes[kind] = _Inbox(sizes if receives else [0] * len(sizes))
        self._posted_bytes = sum(inbox.posted_bytes for inbox in self._inboxes.values())
        self.fullest = Variable()
        self.most_bytes = 0
        """Bytes of the fullest moment so far."""
        self._note()

    def play(self, clock: ClockActions) -> None:
        """Go one clock further."""
        kind = clock[0].kind
        if kind == "STEP":
            h = clock[0].htask
            if h in self._stepping:
                self._stepping.remove(h)
                self._gradient_bytes -= self._htasks[h].adapter_bytes
            return
        inbox = self._inboxes[kind]
        workspace = received = 0
        for action in clock:
            self._posted_bytes += inbox.receive()
            htask = self._htasks[action.htask]
            microbatch = htask.microbatch(action.number)
            if kind == "F":
                self._open(microbatch, 1)
                workspace += microbatch.forward_workspace_bytes
            else:
                workspace += microbatch.backward_workspace_bytes
                received += htask.message_bytes * self._receives_gradients
        self._note(workspace, received)
        if kind == "B":
            for action in clock:
                self._leave(action)
            self._note(0, received)

    def _open(self, microbatch: MicrobatchLoad, times: int) -> None:
        self._activations += times * microbatch.kept.activation_bytes
        self._logits += times * microbatch.kept.logit_bytes
        self._chunk_kv += times * microbatch.left_bytes

    def _leave(self, action: Action) -> None:
        h, htask = action.htask, self._htasks[action.htask]
        self._open(htask.microbatch(action.number), -1)
        position = action.number % htask.carry  # a carry group goes back from its last to its first
        self._chunk_kv += htask.left_gradient_bytes * ((position == htask.carry - 1) - (position == 0))
        if h not in self._stepping:
            self._stepping.add(h)
            self._gradient_bytes += htask.adapter_bytes
        if self._sends_gradients:
            self._sent.append(htask.message_bytes)
            self._sent_bytes += htask.message_bytes
            if len(self._sent) > self._sent_kept:
                self._sent_bytes -= self._sent.popleft()

    def _note(self, workspace: int = 0, received: int = 0) -> None:
        messages = self._posted_bytes + received + self._sent_bytes
        kept = self._activations + self._logits + self._chunk_kv
        now_bytes = self._gradient_bytes + kept + messages + workspace
        if now_bytes > self.most_bytes:
            self.most_bytes = now_bytes
            self.fullest = Variable(
                gradients=self._gradient_bytes,
                activations=self._activations,
                logits=self._logits,
                chunk_kv=self._chunk_kv,
                messages=messages,
                workspace=workspace,
            )


class _Inbox:
    """Messages of one direction, over and over; the next few have their buffers already."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._next = 0
        self.posted_bytes = sum(sizes[i % len(sizes)] for i in range(POSTED_AHEAD) if sizes)

    def receive(self) -> int:
        """Take the next message and post one more receive; bytes that are posted more than before."""
        ahead = (self._next + POSTED_AHEAD) % len(self._sizes)
        change = self._sizes[ahead] - self._sizes[self._next % len(self._sizes)]
        self._next += 1
        return change
