"""Stages that execute every operator of a clock.

Contention is between the two streams of a stage, whose kernels share its processors and memory. Transfers
between stages slow no kernel down, here as in the recurrence; they contend for their links alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from simpy import Environment, Event

from muxtune.schedule import COMMUNICATION, COMPUTE, OperatorSpan
from sim.engine import ClockActions
from sim.noise import Noise
from sim.program import Program
from sim.streams import Recording, play_program

Programs = Callable[[int, ClockActions], Program]
"""What a stage runs in a clock."""


class OperatorLog:
    """Executions of operators; spans are made when somebody asks for them."""

    def __init__(self) -> None:
        self._clocks: list[tuple[int, ClockActions, Program, Recording]] = []

    def add(self, stage: int, clock: ClockActions, program: Program, recording: Recording) -> None:
        """Note a clock that was played."""
        self._clocks.append((stage, clock, program, recording))

    def __len__(self) -> int:
        return sum(len(program) for _, _, program, _ in self._clocks)

    def __iter__(self) -> Iterator[OperatorSpan]:
        for stage, clock, program, recording in self._clocks:
            actions = {action.htask: action for action in clock}
            for stream, kernels, times_s in (
                (COMPUTE, program.compute, recording.compute_s),
                (COMMUNICATION, program.communication, recording.communication_s),
            ):
                starts_s, ends_s = times_s[::2], times_s[1::2]
                for kernel, start_s, end_s in zip(kernels, starts_s, ends_s, strict=True):
                    node = kernel.node
                    action = actions[kernel.htask]
                    yield OperatorSpan(stage, stream, action, node.label, node.role, start_s, end_s)


class OperatorWork:
    """Plays programs on the streams of the stages.

    Args:
        programs: Asked for once per clock.
        stages: Number of stages.
        contention: While both streams of a stage are busy, each runs at rate ``1 / (1 + contention)``.
        noise: Noise of the operators' durations; none by default.
        record: Whether executions are kept.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        stages: int,
        contention: float = 0.0,
        noise: Noise | None = None,
        record: bool = True,
    ) -> None:
        self._programs = programs
        self._slowdown = 1.0 + contention
        drawn = noise or Noise()
        self._factors = [drawn.factors("stage", stage) for stage in range(stages)]
        self._record = record
        self.executed = 0
        """Operators executed so far."""
        self.log = OperatorLog()
        """Log of the executions, if they are kept."""

    def play(self, env: Environment, stage: int, clock: ClockActions) -> Generator[Event, object, None]:
        """Run the clock's program; each of its operators is an event."""
        program = self._programs(stage, clock)
        factors = self._factors[stage]
        recording = Recording() if self._record else None
        yield from play_program(
            env,
            program,
            compute_s=factors.scale(program.compute_s),
            communication_s=factors.scale(program.communication_s),
            slowdown=self._slowdown,
            recording=recording,
        )
        self.executed += len(program)
        if recording is not None:
            self.log.add(stage, clock, program, recording)
