"""What a schedule must fulfil to be executed exactly, and a dry run with finite channels."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from muxtune.schedule.actions import Action, clocks_of, refuse_schedule


def check_schedule(
    stages: Sequence[Sequence[Action]],
    microbatches: Sequence[int],
    *,
    buckets: Sequence[Sequence[int]] | None = None,
    in_flight_limit: bool = True,
    carries: Sequence[int] | None = None,
    in_flight: Sequence[int] = (),
) -> None:
    """Refuse a schedule that cannot be executed exactly.

    Every F has its B later on the same stage, each exactly once; all stages play the same F order and the
    same B order, cut into the same clocks; STEP k of an hTask stands after all of its B of step k and before
    any F of step k+1; steps are complete and count on from 0; a carry group goes forward in order and back in
    reverse; at most ``pp - stage - 1`` clocks are in flight beside the largest carry group, usually one; no
    deadlock.

    Args:
        stages: Action list of each stage.
        microbatches: Micro-batches per hTask and step.
        buckets: Buckets of the plan, if their hTasks share clocks; None if every action is a clock of its
            own.
        in_flight_limit: Whether micro-batches in flight are limited; not under ``gpipe``.
        carries: Micro-batches of each hTask's carry groups; 1 by default.
        in_flight: Per stage, clocks that may be in flight, where a plan declares them.

    Raises:
        SpecError: Names stage and slot and shows the schedule with the spot marked.
    """
    pp = len(stages)
    clocks = [clocks_of(actions, microbatches, buckets) for actions in stages]
    for stage in range(pp):
        limit = pp - stage - 1 + max(carries or (1,)) if in_flight_limit else None
        limit = in_flight[stage] if in_flight else limit
        _check_stage(stages, stage, clocks[stage], microbatches, limit)
        _check_carry_groups(stages, stage, carries or ())
    for kind in ("F", "B"):
        _check_order(stages, clocks, kind)
    for stage, own in enumerate(clocks):
        _check_clocks(stages, stage, own, buckets or ())
    find_deadlock(stages, clocks=clocks)


def _check_stage(
    stages: Sequence[Sequence[Action]],
    stage: int,
    clocks: Sequence[Sequence[Action]],
    microbatches: Sequence[int],
    in_flight: int | None,
) -> None:
    forwards: dict[tuple[int, int], int] = {}  # number of the clock that it went forward in
    backwards: set[tuple[int, int]] = set()
    open_: Counter[int] = Counter()  # of forward clocks, micro-batches without their backward
    steps_done = [0] * len(microbatches)
    places = ((number, action) for number, clock in enumerate(clocks) for action in clock)
    for slot, (clock, action) in enumerate(places):
        if not 0 <= action.htask < len(microbatches):
            refuse_schedule(stages, stage, slot, f"{action} names an hTask that the plan does not have")
        key, m = (action.htask, action.number), microbatches[action.htask]
        done = steps_done[action.htask]
        if action.kind == "F":
            if key in forwards:
                refuse_schedule(stages, stage, slot, f"{action} runs twice")
            if action.number // m > done:
                refuse_schedule(stages, stage, slot, f"{action} runs before STEP{action.htask}.{done}")
            forwards[key] = clock
            open_[clock] += 1
            if in_flight is not None and len(open_) > in_flight:
                refuse_schedule(
                    stages, stage, slot, f"{action} is one more than the {in_flight} allowed in flight"
                )
        elif action.kind == "B":
            if key not in forwards:
                refuse_schedule(
                    stages, stage, slot, f"{action} runs before its F{action.htask}.{action.number}"
                )
            if key in backwards:
                refuse_schedule(stages, stage, slot, f"{action} runs twice")
            backwards.add(key)
            open_ -= Counter({forwards[key]: 1})  # without those that have none left
        else:
            whole = all((action.htask, number) in backwards for number in range(done * m, (done + 1) * m))
            if action.number != done or not whole:
                reason = f"{action} runs before the backwards of step {done} are complete"
                refuse_schedule(stages, stage, slot, reason)
            steps_done[action.htask] += 1
    complete = {(h, n) for h, done in enumerate(steps_done) for n in range(done * microbatches[h])}
    if forwards.keys() != complete or backwards != complete:
        odd = sorted((forwards.keys() ^ complete) | (backwards ^ complete))[0]
        slot = len(stages[stage]) - 1
        refuse_schedule(stages, stage, slot, f"micro-batch {odd[0]}.{odd[1]} is not part of a whole step")


def _check_carry_groups(stages: Sequence[Sequence[Action]], stage: int, carries: Sequence[int]) -> None:
    """Each F stands behind those of its group with lower numbers, each B behind those with higher ones."""
    played: set[Action] = set()
    for slot, action in enumerate(stages[stage]):
        carry = carries[action.htask] if carries and action.kind != "STEP" else 1
        first = action.number - action.number % carry
        forward = range(first, action.number)
        awaited = forward if action.kind == "F" else range(action.number + 1, first + carry)
        for number in awaited:
            if replace(action, number=number) not in played:
                reason = f"{action} runs before {replace(action, number=number)} of its carry group"
                refuse_schedule(stages, stage, slot, reason)
        if carry > 1:
            played.add(action)


def _check_order(
    stages: Sequence[Sequence[Action]], clocks: Sequence[Sequence[tuple[Action, ...]]], kind: str
) -> None:
    reference = [a for a in stages[0] if a.kind == kind]
    cut = [clock for clock in clocks[0] if clock[0].kind == kind]
    for stage, actions in enumerate(stages):
        own = [(slot, a) for slot, a in enumerate(actions) if a.kind == kind]
        if [a for _, a in own] != reference:
            slot = next((s for (s, a), b in zip(own, reference, strict=False) if a != b), len(actions) - 1)
            refuse_schedule(stages, stage, slot, f"{kind} order differs from that of stage 0")
        for clock, expected in zip((c for c in clocks[stage] if c[0].kind == kind), cut, strict=False):
            if clock != expected:
                slot = actions.index(clock[0])
                refuse_schedule(stages, stage, slot, f"the clock of {clock[0]} differs from that of stage 0")


def _check_clocks(
    stages: Sequence[Sequence[Action]],
    stage: int,
    clocks: Sequence[Sequence[Action]],
    buckets: Sequence[Sequence[int]],
) -> None:
    place = {h: number for bucket in buckets for number, h in enumerate(bucket)}
    slot = 0
    for clock in clocks:
        for number, (before, action) in enumerate(pairwise(clock), start=1):
            if place[before.htask] > place[action.htask]:
                reason = f"{action} stands behind {before}, against the order of their bucket"
                refuse_schedule(stages, stage, slot + number, reason)
        slot += len(clock)


def find_deadlock(
    stages: Sequence[Sequence[Action]],
    *,
    capacity: int | None = None,
    clocks: Sequence[Sequence[Sequence[Action]]] | None = None,
) -> None:
    """Dry run: play all stages clock by clock; refuse a schedule that stops.

    Neighbours are joined by one first-in-first-out channel per direction. A clock starts when it has taken
    all its tensors out of the channel, and sends its own when it has ended.

    Args:
        stages: Action list of each stage.
        capacity: Clocks whose tensors a channel holds; a stage waits before it sends more. Without one,
            sending never waits.
        clocks: The lists as :func:`clocks_of` cuts them; by default every action is a clock of its own.

    Raises:
        SpecError: Some stage waits for ever.
    """
    cut = clocks or [clocks_of(actions, (), None) for actions in stages]
    players = [_Player(stage, own) for stage, own in enumerate(cut)]
    channels = {
        (sender, receiver): _Channel(capacity)
        for sender in range(len(stages))
        for receiver in (sender - 1, sender + 1)
        if 0 <= receiver < len(stages)
    }
    while any([player.advance(channels) for player in players]):  # a list: everybody gets a turn
        pass
    for player in players:
        if player.waiting is not None:
            slot, action = player.waiting
            refuse_schedule(stages, player.stage, slot, f"{action} waits for ever (deadlock)")


class _Channel:
    """Tensors on their way between two neighbours."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._tensors: deque[Action] = deque()
        self._left: deque[int] = deque()  # tensors of every clock that lies here

    def put(self, clock: Sequence[Action]) -> bool:
        """Add the tensors of a clock if there is room, and tell whether there was."""
        if self._capacity is not None and len(self._left) >= self._capacity:
            return False
        self._tensors.extend(clock)
        self._left.append(len(clock))
        return True

    def take(self, action: Action) -> bool:
        """Take the tensor of an action if it is in front, and tell whether it was."""
        if not self._tensors or self._tensors[0] != action:
            return False
        self._tensors.popleft()
        self._left[0] -= 1
        if not self._left[0]:
            self._left.popleft()
        return True


class _Player:
    """A stage in the dry run."""

    def __init__(self, stage: int, clocks: Sequence[Sequence[Action]]) -> None:
        self.stage = stage
        self._clocks = clocks
        self._clock = 0
        self._taken = 0  # tensors that the clock already has

    def advance(self, channels: dict[tuple[int, int], _Channel]) -> bool:
        """Play as far as it goes; whether anything happened."""
        before = self._clock, self._taken
        while self._clock < len(self._clocks) and self._play(self._clocks[self._clock], channels):
            self._clock, self._taken = self._clock + 1, 0
        return (self._clock, self._taken) != before

    @property
    def waiting(self) -> tuple[int, Action] | None:
        """Slot and action that it stands at; None at the end of its list."""
        if self._clock == len(self._clocks):
            return None
        clock = self._clocks[self._clock]
        inside = min(self._taken, len(clock) - 1)
        return sum(map(len, self._clocks[: self._clock])) + inside, clock[inside]

    def _play(self, clock: Sequence[Action], channels: dict[tuple[int, int], _Channel]) -> bool:
        direction = {"F": 1, "B": -1, "STEP": 0}[clock[0].kind]
        incoming = channels.get((self.stage - direction, self.stage))
        while self._taken < len(clock) and (incoming is None or incoming.take(clock[self._taken])):
            self._taken += 1
        outgoing = channels.get((self.stage, self.stage + direction))
        return self._taken == len(clock) and (outgoing is None or outgoing.put(clock))
