"""Order in which micro-batches enter the pipeline, and what each of them has to wait for.

The unit is the clock (paper section 3.4): the micro-batches that a stage plays together. By default each is a
clock of its own. Co-scheduled hTasks of a bucket share clocks: the n-th of an iteration has the n-th
micro-batch of every hTask of the bucket that has so many.

    bucket (0, 1), two and one micro-batches:   by turns      F0.0 | F1.0 | F0.1
                                                co-scheduled  F0.0 F1.0 | F0.1

**Carry groups.** The chunks of a sequence may spread over several micro-batches of an hTask in a row, its
carry group. Those behind use keys and values of those before, and give them gradients; so a group enters
without others between, and goes back in reverse order. Co-scheduled hTasks go back in runs of clocks as long
as the largest carry group of their bucket; carry groups are powers of two, so a run reverses whole groups.

**Limit in flight, and why it cannot deadlock.** Clocks have one order forward and one back, both the same on
all stages. Before its i-th backward, stage ``s`` plays ``min(allowed(i), i + pp - s - 1 + g)`` forwards;
``g`` is the longest run. They include the backward's own: what goes back i-th stands at most ``g - 1`` places
further in the order of forwards. And they are no fewer than on the next stage. So whatever a stage waits for,
its neighbour reaches without anything that this stage has not sent yet: the argument of
:func:`muxtune.schedule.actions.schedule_from`, which uses no more than that. (Seq1F1B, arXiv 2406.03488, has
the same limit where all micro-batches are parts of equally many.)

**An own order** lists the hTasks of an iteration's micro-batches as they enter, in place of the turns of
buckets; **an own limit** says per stage how many clocks may be in flight. The argument needs two things of
limits: each holds the longest run, and none exceeds that of the stage before (:func:`check_own_order`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from muxtune.support.errors import SpecError

Template = Literal["flush", "continuous", "gpipe", "lorapp"]

Microbatch = tuple[int, int]
"""hTask and micro-batch number inside one iteration."""


class Clock(NamedTuple):
    """Micro-batches that a stage plays together, one of each hTask."""

    htasks: tuple[int, ...]
    """hTasks of the clock, in the order of their bucket."""
    step: int
    """Optimizer step of all of them."""
    position: int
    """Micro-batch number inside the iteration, the same for all of them."""


@dataclass(frozen=True, slots=True)
class Injection:
    """Clocks in the order in which they enter the pipeline; every stage plays them forward in it."""

    clocks: Sequence[Clock]
    backwards: Sequence[int]
    """Positions in ``clocks`` in the order in which every stage plays them back: the same, but with runs of
    carry groups reversed."""
    run: int
    """Clocks of the longest such run."""
    holds: Sequence[int]
    """Per clock: so many clocks of the list must have gone back through a stage before it goes forward there.
    That its own hTasks' previous step is complete asks for it, or a drain; under ``lorapp`` that their
    previous micro-batch is back. Never decreases, and never ends inside of a reversed run."""
    template: Template
    in_flight: Sequence[int] = ()
    """Per stage, clocks that may be in flight, where these are not what the template says."""

    def forwards_before(self, pp: int) -> list[list[int]]:
        """[stage][i], how many clocks have gone forward through a stage when the i-th goes back there.

        As many as ``holds`` and the limit of clocks in flight allow: ``pp - stage - 1 + run`` in 1F1B, any
        number under ``gpipe``.
        """
        allowed, forward = [], 0
        for done in range(len(self.clocks)):
            while forward < len(self.holds) and self.holds[forward] <= done:
                forward += 1
            allowed.append(forward)
        if self.template == "gpipe" and not self.in_flight:
            return [allowed] * pp
        limits = self.in_flight or [pp - stage - 1 + self.run for stage in range(pp)]
        return [
            [most if most < limit else limit for limit, most in enumerate(allowed, start=in_flight)]
            for in_flight in limits
        ]


def inject(
    buckets: Sequence[Sequence[int]],
    microbatches: Sequence[int],
    *,
    template: Template,
    steps: Sequence[int],
    instances: Sequence[int] | None = None,
    co_scheduled: bool = False,
    carries: Sequence[int] | None = None,
    injection: Sequence[int] = (),
    in_flight: Sequence[int] = (),
) -> Injection:
    """Order the clocks of a schedule; arguments as in :func:`muxtune.schedule.build_schedule`."""
    rotation = iteration_clocks(
        buckets, microbatches, co_scheduled=co_scheduled, carries=carries, injection=injection
    )
    if template == "lorapp" and not injection:
        rotation = spread_evenly(rotation, microbatches)
    clocks: list[Clock] = []
    holds: list[int] = []
    complete = [0] * len(microbatches)  # clocks up to and with the last one of each hTask
    hold = 0
    instance: int | None = None
    for step in range(max(steps)):
        if template in {"flush", "gpipe"}:
            hold = len(clocks)
        for position, members in rotation:
            htasks = members if step < min(steps) else tuple(h for h in members if step < steps[h])
            if not htasks:
                continue
            if instances is not None and instances[htasks[0]] != instance:
                hold, instance = len(clocks), instances[htasks[0]]
            if position == 0 or template == "lorapp":
                hold = max(hold, *(complete[h] for h in htasks))
            clocks.append(Clock(htasks, step, position))
            holds.append(hold)
            for h in htasks:
                complete[h] = len(clocks)
    if carries is None or max(carries) == 1:
        return Injection(clocks, range(len(clocks)), 1, holds, template, in_flight)
    backwards, holds = _reverse_runs(clocks, holds, _run_lengths(buckets, carries, co_scheduled=co_scheduled))
    return Injection(clocks, backwards, max(carries), holds, template, in_flight)


def _run_lengths(
    buckets: Iterable[Sequence[int]], carries: Sequence[int], *, co_scheduled: bool
) -> list[tuple[object, int]]:
    """Per hTask, who else has clocks in the same reversed runs, and how many clocks a run has."""
    runs: list[tuple[object, int]] = [(h, carry) for h, carry in enumerate(carries)]
    if co_scheduled:
        for bucket in buckets:
            for h in bucket:
                runs[h] = (tuple(bucket), max(carries[each] for each in bucket))
    return runs


def _reverse_runs(
    clocks: Sequence[Clock], holds: Sequence[int], runs: Sequence[tuple[object, int]]
) -> tuple[list[int], list[int]]:
    """Order of backwards, and ``holds`` moved to the ends of the runs that they fall into."""

    def run_of(position: int) -> tuple[object, ...]:
        clock = clocks[position]
        owner, length = runs[clock.htasks[0]]
        return owner, clock.step, clock.position // length

    backwards: list[int] = []
    ends = [0]  # of the run of every clock, behind a 0 for no clock
    for _, members in groupby(range(len(clocks)), key=run_of):
        run = list(members)
        backwards += reversed(run)
        ends += [run[-1] + 1] * len(run)
    return backwards, [ends[hold] for hold in holds]


def iteration_clocks(
    buckets: Sequence[Sequence[int]],
    microbatches: Sequence[int],
    *,
    co_scheduled: bool,
    carries: Sequence[int] | None = None,
    injection: Sequence[int] = (),
) -> list[tuple[int, tuple[int, ...]]]:
    """Micro-batch number and hTasks of the clocks of one iteration, in the order of injection.

    By turns, hTasks alternate with whole carry groups, of one micro-batch by default. An own ``injection`` is
    the order itself.
    """
    if injection:
        played = [0] * len(microbatches)
        own: list[tuple[int, tuple[int, ...]]] = []
        for h in injection:
            own.append((played[h], (h,)))
            played[h] += 1
        return own
    rotation: list[tuple[int, tuple[int, ...]]] = []
    for bucket in buckets:
        if co_scheduled:
            for number in range(max(microbatches[h] for h in bucket)):
                rotation.append((number, tuple(h for h in bucket if number < microbatches[h])))
            continue
        size = {h: carries[h] if carries else 1 for h in bucket}
        for turn in range(max(microbatches[h] // size[h] for h in bucket)):
            for h in bucket:
                if turn < microbatches[h] // size[h]:
                    rotation += [(number, (h,)) for number in range(turn * size[h], (turn + 1) * size[h])]
    return rotation


def spread_evenly(
    rotation: Sequence[tuple[int, tuple[int, ...]]], microbatches: Sequence[int]
) -> list[tuple[int, tuple[int, ...]]]:
    """The clocks of an iteration with those of each hTask as far apart as their numbers let them.

    Where whoever has nothing on its way injects next, hTasks with few micro-batches are still there while
    others work through many; an iteration's order has to say so.
    """

    def due(clock: tuple[int, tuple[int, ...]]) -> float:
        number, htasks = clock
        return (number + 0.5) / max(microbatches[h] for h in htasks)

    return sorted(rotation, key=due)  # stable: ties in the order of the buckets


def injection_order(buckets: Sequence[Sequence[int]], microbatches: Sequence[int]) -> list[Microbatch]:
    """Order in which one iteration's micro-batches enter the pipeline.

    Args:
        buckets: hTasks of each bucket, in order of injection. Those of one bucket take turns.
        microbatches: Micro-batches per hTask.
    """
    rotation = iteration_clocks(buckets, microbatches, co_scheduled=False)
    return [(h, number) for number, (h,) in rotation]


def clocks_in_flight(
    template: Template,
    microbatches: Sequence[int],
    *,
    pp: int,
    stage: int,
    instances: Sequence[int] | None = None,
    carries: Sequence[int] | None = None,
    in_flight: Sequence[int] = (),
) -> int:
    """Clocks that a stage may have in flight at most.

    What ``in_flight`` says of the stage; without it ``pp - stage`` in 1F1B, and one less than the largest
    carry group more; under ``gpipe`` all of the largest instance's iteration, counted in micro-batches.
    """
    if in_flight:
        return in_flight[stage]
    if template != "gpipe":
        return pp - stage - 1 + max(carries or (1,))
    owners = instances or [0] * len(microbatches)
    return max(
        sum(m for m, owner in zip(microbatches, owners, strict=True) if owner == instance)
        for instance in set(owners)
    )


def check_own_order(
    microbatches: Sequence[int],
    *,
    pp: int,
    injection: Sequence[int] = (),
    in_flight: Sequence[int] = (),
    carries: Sequence[int] | None = None,
    co_scheduled: bool = False,
) -> None:
    """Refuse an own order of injection or an own limit in flight that no schedule may have.

    Args:
        microbatches: Micro-batches per hTask and step.
        pp: Pipeline stages.
        injection: hTasks of an iteration's micro-batches in the order in which they enter; empty where the
            buckets say it.
        in_flight: Per stage, clocks that may be in flight; empty where the template says it.
        carries: Micro-batches of each hTask's carry groups; 1 by default.
        co_scheduled: Whether the hTasks of a bucket share clocks.

    Raises:
        SpecError: Names ``injection`` or ``in_flight``.
    """
    sizes = list(carries or [1] * len(microbatches))
    if injection:
        if Counter(injection) != Counter(dict(enumerate(microbatches))):
            listed = ", ".join(f"{m} times {h}" for h, m in enumerate(microbatches))
            raise SpecError("injection", list(injection), f"every micro-batch of an iteration: {listed}")
        if co_scheduled:
            raise SpecError("injection", list(injection), "nothing: hTasks of a bucket share clocks")
        runs = [(h, len(list(same))) for h, same in groupby(injection)]
        for h, length in runs:
            if length % sizes[h]:
                expected = f"the {sizes[h]} micro-batches of a carry group of hTask {h} side by side"
                raise SpecError("injection", list(injection), expected)
    if in_flight:
        least = max(sizes)
        falls = all(before >= after for before, after in pairwise(in_flight))
        if len(in_flight) != pp or min(in_flight) < least or not falls:
            expected = f"{pp} integers, one per stage, of at least {least}, none above the one before"
            raise SpecError("in_flight", list(in_flight), expected)


def shared_clocks(buckets: Sequence[Sequence[int]], microbatches: Sequence[int]) -> list[tuple[int, ...]]:
    """Kinds of clocks, by their hTasks, that several share when buckets are co-scheduled."""
    rotation = iteration_clocks(buckets, microbatches, co_scheduled=True)
    return list(dict.fromkeys(htasks for _, htasks in rotation if len(htasks) > 1))
