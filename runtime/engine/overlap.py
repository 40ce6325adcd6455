"""Plays the actions of a clock together: one computes while the sums of others are under way.

The plan's launch order says whose turn it is (paper section 3.4). It is followed as far as it goes and
nothing depends on it: an action that has more turns than parts is through, and one that has fewer gets its
turns at the end. All ranks of a stage follow the same order, so they launch their sums in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from muxtune.orchestration import LaunchSegment
from muxtune.schedule import Action
from runtime.device.devices import CPU, RankDevice
from runtime.device.stopwatch import Mark
from runtime.distributed.teams import StageTeam
from runtime.engine.relay import Body, Relay
from runtime.ops.deferred import SideWork, collecting


@dataclass(slots=True)
class _Part:
    """An action of the clock that is being played."""

    action: Action
    place: int
    """Place in the relay."""
    side: SideWork = field(default_factory=SideWork)
    ended: bool = False

    def run(self, body: Body) -> None:
        # One thread has one graph's backward. Else a device's backwards would share a thread, where one that
        # pauses holds up the others.
        with collecting(self.side), torch.autograd.set_multithreading_enabled(False):
            body()


class Overlap:
    """Clocks of one rank.

    Args:
        team: The ranks of its stage.
        record: Called with an action, and when it began to run, each time that it stops.
        device: Device of the rank.
    """

    def __init__(
        self, team: StageTeam, record: Callable[[Action, Mark], None], device: RankDevice = CPU
    ) -> None:
        self._team = team
        self._record = record
        self._device = device
        self._threads = torch.get_num_threads()
        self._relay = Relay(self._prepare_thread)

    def _prepare_thread(self) -> None:
        """Settings that are a thread's own."""
        torch.set_num_threads(self._threads)
        self._device.enter()

    def play(self, bodies: Mapping[Action, Body], segments: Sequence[LaunchSegment]) -> None:
        """Play a clock.

        Args:
            bodies: What its actions do, each of another hTask.
            segments: Segments in the order of their turns.

        Raises:
            BaseException: What a body raised; the others are abandoned.
        """
        parts = {action.htask: _Part(action, place) for place, action in enumerate(bodies)}
        for part in parts.values():
            self._relay.begin(part.place, partial(part.run, bodies[part.action]))
        self._team.pause = self._relay.pause
        try:
            for segment in segments:
                part = parts[segment.htask]
                if segment.side:
                    self._finish_side_work(part, segment.number)
                else:
                    self._resume(part)
            unfinished = list(parts.values())
            while unfinished:
                unfinished = [part for part in unfinished if self._resume(part)]
            for part in parts.values():
                self._finish_side_work(part)
        finally:
            self._team.pause = self._team.action = None

    def _resume(self, part: _Part) -> bool:
        """Let an action go on to its next sum; whether it has more to do then."""
        if not part.ended:
            start = self._team.stopwatch.now()
            self._team.action = part.action
            part.ended = not self._relay.resume(part.place)
            self._record(part.action, start)
            part.side.segment += 1
        return not part.ended

    def _finish_side_work(self, part: _Part, segment: int | None = None) -> None:
        if part.side.waits(segment):
            start = self._team.stopwatch.now()
            part.side.run(segment)
            self._record(part.action, start)

    def close(self) -> None:
        """End the threads."""
        self._relay.close()
