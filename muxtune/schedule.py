"""Pipeline schedules as data: per stage a list of actions (paper section 3.4).

One generator feeds simulator and runtime. Micro-batches of all hTasks are injected in one order and played as
1F1B: stage ``s`` of ``pp`` keeps at most ``pp - s`` forwards without their backward. Two templates:

* ``flush``: every iteration drains before the next one starts.
* ``continuous``: the order of one iteration is repeated without a drain in between; the forward of an hTask's
  next step waits only for that hTask's own optimizer step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal

from muxtune.errors import SpecError

Kind = Literal["F", "B", "STEP"]
Template = Literal["flush", "continuous"]


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a stage's list; ``F2.0`` is the forward of hTask 2, micro-batch 0."""

    kind: Kind
    htask: int
    """Position of the hTask in the plan."""
    number: int
    """Micro-batch (F, B) or optimizer step (STEP), counted on over the scheduled iterations."""

    def __str__(self) -> str:
        return f"{self.kind}{self.htask}.{self.number}"

    @staticmethod
    def parse(text: str) -> Action:
        """Inverse of ``str``.

        Raises:
            SpecError: ``text`` is no action.
        """
        match = re.fullmatch(r"(F|B|STEP)(\d+)\.(\d+)", text)
        if match is None:
            raise SpecError("action", text, "such as F0.1, B0.1 or STEP0.0")
        return Action(match[1], int(match[2]), int(match[3]))  # type: ignore[arg-type]


Microbatch = tuple[int, int]
"""hTask and micro-batch number inside one iteration."""


def injection_order(buckets: Sequence[Sequence[int]], microbatches: Sequence[int]) -> list[Microbatch]:
    """Order in which one iteration's micro-batches enter the pipeline.

    Args:
        buckets: hTasks of each bucket, in order of injection. Those of one bucket take turns.
        microbatches: Per hTask.
    """
    order: list[Microbatch] = []
    for bucket in buckets:
        for number in range(max(microbatches[h] for h in bucket)):
            order += [(h, number) for h in bucket if number < microbatches[h]]
    return order


def build_schedule(
    buckets: Sequence[Sequence[int]],
    microbatches: Sequence[int],
    *,
    pp: int,
    template: Template,
    steps: Sequence[int],
    instances: Sequence[int] | None = None,
) -> list[list[Action]]:
    """Action lists of all stages.

    Args:
        buckets: hTasks per bucket, in order of injection.
        microbatches: Per hTask and step.
        pp: Pipeline stages.
        template: Whether iterations drain.
        steps: Optimizer steps per hTask; an hTask leaves the rotation after its last.
        instances: Backbone instance per hTask, one for all by default. Instances are jobs of their own that
            take turns: one drains before the next begins.

    Returns:
        ``pp`` lists.
    """
    order = injection_order(buckets, microbatches)
    iterations = [
        [(h, step * microbatches[h] + number) for h, number in order if step < steps[h]]
        for step in range(max(steps))
    ]
    batches = [list(chain.from_iterable(iterations))] if template == "continuous" else iterations
    stages: list[list[Action]] = [[] for _ in range(pp)]
    for batch in batches:
        for _, turn in groupby(batch, key=lambda entry: instances[entry[0]] if instances else 0):
            entries = list(turn)
            forwards = [Action("F", h, number) for h, number in entries]  # shared by all stages
            backwards = [_backward(entry, microbatches) for entry in entries]
            needed = _backwards_before_forward(entries, microbatches)
            for stage in range(pp):
                stages[stage] += _one_f_one_b(forwards, backwards, needed, in_flight=pp - stage)
    return stages


def _one_f_one_b(
    forwards: Sequence[Action],
    backwards: Sequence[Sequence[Action]],
    needed_backwards: Sequence[int],
    in_flight: int,
) -> list[Action]:
    """1F1B over a batch of micro-batches with at most ``in_flight`` open forwards.

    A forward is also held back until its hTask's previous step is done on this stage. The point where that
    happens depends on the backwards alone, so every stage holds back at the same backward, and a later stage
    never asks for a forward that an earlier one has not yet sent: no deadlock.
    """
    actions: list[Action] = []
    done = 0
    for position, forward in enumerate(forwards):
        while position - done == in_flight or done < needed_backwards[position]:
            actions += backwards[done]
            done += 1
        actions.append(forward)
    for backward in backwards[done:]:
        actions += backward
    return actions


def _backward(entry: Microbatch, microbatches: Sequence[int]) -> list[Action]:
    h, number = entry
    step, position = divmod(number, microbatches[h])
    actions = [Action("B", h, number)]
    if position == microbatches[h] - 1:
        actions.append(Action("STEP", h, step))
    return actions


def _backwards_before_forward(batch: Sequence[Microbatch], microbatches: Sequence[int]) -> list[int]:
    """How many backwards must be done before each forward, for the hTask's own previous step."""
    last: dict[tuple[int, int], int] = {}  # (hTask, step) -> number of backwards that complete it
    for position, (h, number) in enumerate(batch):
        last[h, number // microbatches[h]] = position + 1
    return [last.get((h, number // microbatches[h] - 1), 0) for h, number in batch]


def check_schedule(
    stages: Sequence[Sequence[Action]], microbatches: Sequence[int], *, in_flight_limit: bool = True
) -> None:
    """Refuse a schedule that cannot be executed exactly.

    Every F has its B later on the same stage, each exactly once; all stages play the same F order and the
    same B order; STEP k of an hTask stands after all of its B of step k and before any F of step k+1; steps
    are complete and count on from 0; at most ``pp - stage`` micro-batches are in flight; no deadlock.

    Raises:
        SpecError: Names stage and slot and shows the schedule with the spot marked.
    """
    pp = len(stages)
    for stage, actions in enumerate(stages):
        _check_stage(stages, stage, actions, microbatches, pp - stage if in_flight_limit else None)
    for kind in ("F", "B"):
        reference = [a for a in stages[0] if a.kind == kind]
        for stage, actions in enumerate(stages):
            own = [(slot, a) for slot, a in enumerate(actions) if a.kind == kind]
            if [a for _, a in own] != reference:
                slot = next(
                    (s for (s, a), b in zip(own, reference, strict=False) if a != b), len(actions) - 1
                )
                _refuse(stages, stage, slot, f"{kind} order differs from that of stage 0")
    find_deadlock(stages)


def _check_stage(
    stages: Sequence[Sequence[Action]],
    stage: int,
    actions: Sequence[Action],
    microbatches: Sequence[int],
    in_flight: int | None,
) -> None:
    forwards: set[tuple[int, int]] = set()
    backwards: set[tuple[int, int]] = set()
    steps_done = [0] * len(microbatches)
    for slot, action in enumerate(actions):
        if not 0 <= action.htask < len(microbatches):
            _refuse(stages, stage, slot, f"{action} names an hTask that the plan does not have")
        key, m = (action.htask, action.number), microbatches[action.htask]
        done = steps_done[action.htask]
        if action.kind == "F":
            if key in forwards:
                _refuse(stages, stage, slot, f"{action} runs twice")
            if action.number // m > done:
                _refuse(stages, stage, slot, f"{action} runs before STEP{action.htask}.{done}")
            forwards.add(key)
            if in_flight is not None and len(forwards) - len(backwards) > in_flight:
                _refuse(stages, stage, slot, f"{action} is one more than the {in_flight} allowed in flight")
        elif action.kind == "B":
            if key not in forwards:
                _refuse(stages, stage, slot, f"{action} runs before its F{action.htask}.{action.number}")
            if key in backwards:
                _refuse(stages, stage, slot, f"{action} runs twice")
            backwards.add(key)
        else:
            own = {(action.htask, done * m + i) for i in range(m)}
            if action.number != done or not own <= backwards:
                _refuse(
                    stages, stage, slot, f"{action} runs before the backwards of step {done} are complete"
                )
            steps_done[action.htask] += 1
    complete = {(h, n) for h, done in enumerate(steps_done) for n in range(done * microbatches[h])}
    if forwards != complete or backwards != complete:
        odd = sorted((forwards ^ complete) | (backwards ^ complete))[0]
        _refuse(stages, stage, len(actions) - 1, f"micro-batch {odd[0]}.{odd[1]} is not part of a whole step")


def find_deadlock(stages: Sequence[Sequence[Action]]) -> None:
    """Dry run: play all stages, sending without blocking; refuse a schedule that stops.

    Raises:
        SpecError: Some stage waits for ever.
    """
    pp = len(stages)
    position = [0] * pp
    sent: set[tuple[int, Action]] = set()  # stage that finished it, action
    moved = True
    while moved:
        moved = False
        for stage in range(pp):
            while position[stage] < len(stages[stage]):
                action = stages[stage][position[stage]]
                if not _arrived(action, stage, pp, sent):
                    break
                sent.add((stage, action))
                position[stage] += 1
                moved = True
    for stage in range(pp):
        if position[stage] < len(stages[stage]):
            waiting = stages[stage][position[stage]]
            _refuse(stages, stage, position[stage], f"{waiting} waits for ever (deadlock)")


def _arrived(action: Action, stage: int, pp: int, sent: set[tuple[int, Action]]) -> bool:
    if action.kind == "F":
        return stage == 0 or (stage - 1, action) in sent
    if action.kind == "B":
        return stage == pp - 1 or (stage + 1, action) in sent
    return True


def render_schedule(stages: Sequence[Sequence[Action]], mark: tuple[int, int] | None = None) -> str:
    """The schedule as a grid, one line per stage; ``mark`` = (stage, slot) cuts there and points at it."""
    width = max((len(str(a)) for actions in stages for a in actions), default=1)
    lines = []
    for stage, actions in enumerate(stages):
        stop = len(actions) if mark is None else min(len(actions), mark[1] + 1)
        start = 0 if mark is None else max(0, mark[1] - 6)
        cells = "  ".join(str(a).ljust(width) for a in actions[start:stop])
        pointer = f"  <- slot {mark[1]}" if mark and mark[0] == stage else ""
        lines.append(f"  stage {stage} | {cells.rstrip()}{pointer}")
    return "\n".join(lines)


def _refuse(stages: Sequence[Sequence[Action]], stage: int, slot: int, reason: str) -> None:
    raise ScheduleError(f"schedule[{stage}][{slot}]", reason, render_schedule(stages, (stage, slot)))


class ScheduleError(SpecError):
    """A schedule that may not run; ``grid`` shows it with the spot marked."""

    def __init__(self, field: str, reason: str, grid: str) -> None:
        super().__init__(field, reason, "a valid schedule")
        self.args = (field, reason, grid)

    def __str__(self) -> str:
        field, reason, _ = self.args
        return f"{field}: {reason}"

    @property
    def grid(self) -> str:
        """The schedule around the spot, one line per stage."""
        return str(self.args[2])
