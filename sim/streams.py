"""Execution of a program: the two streams of a stage, which slow each other down while both are busy."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from simpy import Environment, Event

from sim.program import Program


@dataclass(frozen=True, slots=True)
class Recording:
    """When the kernels of a program ran: start and end of each in turn, in launch order.

    Plain numbers, because there are millions; objects would cost more than the simulation.
    """

    compute_s: list[float] = field(default_factory=list)
    communication_s: list[float] = field(default_factory=list)


def play_program(
    env: Environment,
    program: Program,
    *,
    compute_s: Sequence[float],
    communication_s: Sequence[float],
    slowdown: float = 1.0,
    recording: Recording | None = None,
) -> Generator[Event, object, None]:
    """Run a program; every end of a kernel is an event of ``env``.

    A stream starts its next kernel as soon as enough kernels of the other stream have ended. While both run,
    each takes ``slowdown`` seconds for a second of its work, so what is left of the one that runs on is
    counted in work and not in time: no event has to be moved.

    Args:
        env: Clock of the run.
        program: Kernels in launch order.
        compute_s: Work of each compute kernel: seconds that it takes alone.
        communication_s: Work of each communication kernel: seconds that it takes alone.
        slowdown: Seconds for a second of work while both streams run, at least 1.
        recording: Where starts and ends are noted.
    """
    timeout = env.timeout
    compute_needs, communication_needs = program.compute_needs, program.communication_needs
    computes, communications = len(compute_s), len(communication_s)
    computed = communicated = 0  # that have ended; the position of what runs, or comes next
    computing = communicating = False
    compute_left = communication_left = 0.0
    compute_start = communication_start = now = env.now
    while True:
        if not computing and computed < computes and compute_needs[computed] <= communicated:
            computing, compute_left, compute_start = True, compute_s[computed], now
        if (
            not communicating
            and communicated < communications
            and communication_needs[communicated] <= computed
        ):
            communicating, communication_left = True, communication_s[communicated]
            communication_start = now
        if not (computing or communicating):
            return  # a program has no deadlock: both streams are at their end
        if computing and (not communicating or compute_left <= communication_left):
            if communicating:
                yield timeout(compute_left * slowdown)
                communication_left -= compute_left
            else:
                yield timeout(compute_left)
            now = env.now
            if recording is not None:
                recording.compute_s.extend((compute_start, now))
            computing = False
            computed += 1
        else:
            if computing:
                yield timeout(communication_left * slowdown)
                compute_left -= communication_left
            else:
                yield timeout(communication_left)
            now = env.now
            if recording is not None:
                recording.communication_s.extend((communication_start, now))
            communicating = False
            communicated += 1


def program_seconds(program: Program, contention: float = 0.0) -> float:
    """Seconds of a program by itself.

    Args:
        program: Kernels in launch order.
        contention: While both streams are busy, each runs at rate ``1 / (1 + contention)``.
    """
    env = Environment()
    env.process(
        play_program(
            env,
            program,
            compute_s=program.compute_s,
            communication_s=program.communication_s,
            slowdown=1.0 + contention,
        )
    )
    env.run()
    return float(env.now)
