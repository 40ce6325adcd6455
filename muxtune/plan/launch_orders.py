"""The launch orders of a plan's clocks, as its file has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from pydantic import Field

from muxtune.orchestration import Barrier, LaunchOrder, decode_turns, encode_turns
from muxtune.support.strict_models import StrictModel


class StageLaunches(StrictModel):
    """The order of a clock's subgraphs on some stages, which are alike."""

    stages: tuple[int, ...] = Field(min_length=1)
    """Stages with this order."""
    barrier: Barrier
    """What ends on both streams before the next one begins."""
    compute: str
    """Subgraphs on the compute stream: ``0:0-2 1:0 0:3`` are three of the clock's first hTask, one of its
    second, and the fourth of the first."""
    communication: str
    """Subgraphs on the communication stream, written in the same way."""

    @property
    def order(self) -> LaunchOrder:
        """Decoded launch order.

        Raises:
            SpecError: A text is no order.
        """
        return _decoded(self.barrier, self.compute, self.communication)


@lru_cache(maxsize=1024)  # a simulation asks for every clock
def _decoded(barrier: Barrier, compute: str, communication: str) -> LaunchOrder:
    return LaunchOrder(barrier, decode_turns(compute), decode_turns(communication))


class ClockLaunches(StrictModel):
    """In what order every stage launches the subgraphs of a kind of clock."""

    kind: Literal["F", "B"]
    """Forward or backward."""
    htasks: tuple[int, ...] = Field(min_length=1)
    """hTasks of the clock, in the order of their bucket; turns name them by their position here."""
    orders: tuple[StageLaunches, ...] = Field(min_length=1)
    """Every stage once."""

    def on_stage(self, stage: int) -> LaunchOrder:
        """The order of a stage; :func:`muxtune.plan.check_plan` made sure that there is one."""
        return next(each.order for each in self.orders if stage in each.stages)


def clock_launches(
    kind: Literal["F", "B"], htasks: tuple[int, ...], orders: Sequence[LaunchOrder]
) -> ClockLaunches:
    """Launch orders as a plan has them; stages with equal ones stand together.

    Args:
        kind: Kind of the clock.
        htasks: hTasks of the clock.
        orders: Launch order of every stage.
    """
    stages: dict[LaunchOrder, list[int]] = {}
    for stage, order in enumerate(orders):
        stages.setdefault(order, []).append(stage)
    return ClockLaunches(
        kind=kind,
        htasks=htasks,
        orders=tuple(
            StageLaunches(
                stages=tuple(alike),
                barrier=order.barrier,
                compute=encode_turns(order.compute),
                communication=encode_turns(order.communication),
            )
            for order, alike in stages.items()
        ),
    )
