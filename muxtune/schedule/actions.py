"""Pipeline schedules as data: per stage a list of actions (paper section 3.4).

One generator feeds simulator and runtime. Micro-batches of all hTasks are injected in one order
(:mod:`muxtune.schedule.pipeline_order`). Three templates play them as 1F1B, where stage ``s`` of ``pp`` keeps
at most ``pp - s`` forwards without their backward:

* ``flush``: every iteration drains before the next one starts.
* ``continuous``: the order of one iteration is repeated without a drain in between; the forward of an hTask's
  next step waits only for that hTask's own optimizer step.
* ``lorapp`` (arXiv 2312.02515): like ``continuous``, but an hTask has one micro-batch on its way at most; its
  next one waits for the backward of the one before. An iteration's micro-batches are spread evenly.

The last, ``gpipe``, plays all forwards of an iteration, then all its backwards.

The micro-batches of a clock stand next to each other; the limit of 1F1B is one of clocks. Where sequences
spread over several micro-batches, these go back in reverse order, and the limit is higher by one less than
they are (:mod:`muxtune.schedule.pipeline_order`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NoReturn

from muxtune.schedule.pipeline_order import Clock, Injection, Template, inject
from muxtune.support.errors import SpecError

__all__ = [
    "Action",
    "Kind",
    "ScheduleError",
    "Template",
    "build_schedule",
    "clocks_of",
    "refuse_schedule",
    "render_schedule",
    "schedule_from",
]

Kind = Literal["F", "B", "STEP"]


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


def build_schedule(
    buckets: Sequence[Sequence[int]],
    microbatches: Sequence[int],
    *,
    pp: int,
    template: Template,
    steps: Sequence[int],
    instances: Sequence[int] | None = None,
    co_scheduled: bool = False,
    carries: Sequence[int] | None = None,
    injection: Sequence[int] = (),
    in_flight: Sequence[int] = (),
) -> list[list[Action]]:
    """Action lists of all stages.

    Args:
        buckets: hTasks per bucket, in order of injection.
        microbatches: Micro-batches per hTask and step.
        pp: Pipeline stages.
        template: Whether iterations drain, and how they are played.
        steps: Optimizer steps per hTask; an hTask leaves the rotation after its last.
        instances: Backbone instance per hTask, one for all by default. Instances are jobs of their own that
            take turns: one drains before the next begins.
        co_scheduled: The hTasks of a bucket share clocks; they are of one instance.
        carries: Micro-batches of each hTask's carry groups, powers of two that divide its micro-batches; 1 by
            default, and always under ``lorapp``.
        injection: hTasks of an iteration's micro-batches in the order in which they enter, in place of the
            buckets' turns.
        in_flight: Per stage, clocks that may be in flight, in place of the template's limit; see
            :func:`muxtune.schedule.pipeline_order.check_own_order`.

    Returns:
        ``pp`` lists.
    """
    order = inject(
        buckets,
        microbatches,
        template=template,
        steps=steps,
        instances=instances,
        co_scheduled=co_scheduled,
        carries=carries,
        injection=injection,
        in_flight=in_flight,
    )
    return schedule_from(order, microbatches, pp=pp)


def schedule_from(injection: Injection, microbatches: Sequence[int], *, pp: int) -> list[list[Action]]:
    """Action lists of ``pp`` stages for an order of injection.

    Clocks go back in one order on all stages. How many have gone back through a stage before a clock goes
    forward there is the larger of two numbers: ``holds``, the same for all stages, and what 1F1B asks for,
    which is more on later stages. So a later stage never asks for a forward that an earlier one has not yet
    sent: no deadlock.
    """
    backwards = _backwards(injection, microbatches)  # shared by all stages
    forwards: list[Action] = []
    starts = [0]  # of every clock in ``forwards``
    for clock in injection.clocks:
        forwards += _actions_of("F", clock, microbatches)
        starts.append(len(forwards))
    stages: list[list[Action]] = []
    for stops in injection.forwards_before(pp):
        actions: list[Action] = []
        played = 0
        for backward, stop in zip(backwards, stops, strict=True):
            actions += forwards[starts[played] : starts[stop]]
            actions += backward
            played = stop
        stages.append(actions)
    return stages


def _actions_of(kind: Kind, clock: Clock, microbatches: Sequence[int]) -> list[Action]:
    return [Action(kind, h, clock.step * microbatches[h] + clock.position) for h in clock.htasks]


def _backwards(injection: Injection, microbatches: Sequence[int]) -> list[list[Action]]:
    """Per clock in the order of backwards, its backward and the steps that are complete with it."""
    clocks = [injection.clocks[position] for position in injection.backwards]
    last = {(h, clock.step): place for place, clock in enumerate(clocks) for h in clock.htasks}
    return [
        _actions_of("B", clock, microbatches)
        + [Action("STEP", h, clock.step) for h in clock.htasks if last[h, clock.step] == place]
        for place, clock in enumerate(clocks)
    ]


ClockActions = tuple[Action, ...]
"""What a stage plays together; a STEP stands alone."""


def clocks_of(
    actions: Sequence[Action], microbatches: Sequence[int], buckets: Sequence[Sequence[int]] | None
) -> list[ClockActions]:
    """Cut a stage's list into clocks.

    Neighbours in the list share a clock if they are of one kind and bucket and have the same micro-batch
    number inside the same iteration.

    Args:
        actions: Actions of a stage.
        microbatches: Micro-batches per hTask and step.
        buckets: Buckets of the plan, if their hTasks share clocks; None if every action is a clock of its
            own.

    Returns:
        All actions in their order; a STEP stands alone.
    """
    if buckets is None:
        return [(action,) for action in actions]
    bucket_of = {h: number for number, bucket in enumerate(buckets) for h in bucket}

    def place(entry: tuple[int, Action]) -> tuple[object, ...]:
        slot, action = entry
        if action.kind == "STEP" or action.htask not in bucket_of:
            return (slot,)
        return (action.kind, bucket_of[action.htask], *divmod(action.number, microbatches[action.htask]))

    return [tuple(action for _, action in group) for _, group in groupby(enumerate(actions), key=place)]


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


def refuse_schedule(stages: Sequence[Sequence[Action]], stage: int, slot: int, reason: str) -> NoReturn:
    """Raise :class:`ScheduleError` with the schedule around the spot."""
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
