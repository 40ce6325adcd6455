"""Random schedule problems, and a pipeline with bounded channels of the tests' own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from muxtune.schedule import Action, Template, build_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    buckets: tuple[tuple[int, ...], ...]
    microbatches: tuple[int, ...]
    steps: tuple[int, ...]
    pp: int
    template: Template
    co_scheduled: bool = False
    carries: tuple[int, ...] | None = None
    injection: tuple[int, ...] = ()
    in_flight: tuple[int, ...] = ()

    def build(self) -> list[list[Action]]:
        return build_schedule(
            self.buckets,
            self.microbatches,
            pp=self.pp,
            template=self.template,
            steps=self.steps,
            co_scheduled=self.co_scheduled,
            carries=self.carries,
            injection=self.injection,
            in_flight=self.in_flight,
        )

    @property
    def shared_buckets(self) -> tuple[tuple[int, ...], ...] | None:
        """As ``check_schedule`` and ``clocks_of`` take them."""
        return self.buckets if self.co_scheduled else None


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    templates: Sequence[Template] = ("flush", "continuous", "gpipe", "lorapp"),
    max_pp: int = 16,
    equal_steps: bool = False,
    may_share: bool = True,
    may_carry: bool = False,
) -> Problem:
    htasks = draw(st.integers(1, 6))
    order = draw(st.permutations(range(htasks)))
    cuts = sorted(draw(st.sets(st.integers(1, htasks - 1)))) if htasks > 1 else []
    each = st.lists(st.integers(1, 5), min_size=htasks, max_size=htasks)
    steps = [draw(st.integers(1, 5))] * htasks if equal_steps else draw(each)
    template = draw(st.sampled_from(templates))
    carried = [1] if template == "lorapp" else [1, 2, 4]
    carries = tuple(draw(st.sampled_from(carried)) for _ in range(htasks)) if may_carry else None
    return Problem(
        buckets=tuple(tuple(order[i:j]) for i, j in zip([0, *cuts], [*cuts, htasks], strict=True)),
        microbatches=tuple(m * carry for m, carry in zip(draw(each), carries or [1] * htasks, strict=True)),
        steps=tuple(steps),
        pp=draw(st.integers(1, max_pp)),
        template=template,
        co_scheduled=may_share and draw(st.booleans()),
        carries=carries,
    )


@st.composite
def own_orders(draw: st.DrawFn, *, may_carry: bool = True) -> Problem:
    """Problems with an order of injection and a limit in flight of their own, or one of both."""
    problem = draw(problems(may_share=False, may_carry=may_carry, max_pp=6))
    sizes = problem.carries or (1,) * len(problem.microbatches)
    groups = [h for h, m in enumerate(problem.microbatches) for _ in range(m // sizes[h])]
    injection = tuple(h for h in draw(st.permutations(groups)) for _ in range(sizes[h]))
    least = max(sizes)
    limits = draw(st.lists(st.integers(least, least + 8), min_size=problem.pp, max_size=problem.pp))
    in_flight = tuple(sorted(limits, reverse=True))
    own = draw(st.sampled_from(["order", "limit", "both"]))
    return replace(
        problem,
        injection=injection if own != "limit" else (),
        in_flight=in_flight if own != "order" else (),
    )


def play_with_bounded_channels(stages: Sequence[Sequence[Action]], capacity: int) -> bool:
    """Whether the stages finish when every send blocks while ``capacity`` tensors lie unread in its channel.

    One first-in-first-out channel per neighbour and direction; a tensor that nobody wants stays in front.
    """
    channels: dict[tuple[int, int], deque[tuple[int, int]]] = {}
    for stage in range(len(stages) - 1):
        channels[stage, stage + 1] = deque()
        channels[stage + 1, stage] = deque()
    position = [0] * len(stages)
    computed = [False] * len(stages)  # the action at ``position`` has run, but its result is not sent yet

    def advance(stage: int) -> bool:
        action = stages[stage][position[stage]]
        if action.kind != "STEP":
            direction = 1 if action.kind == "F" else -1
            tensor = (action.htask, action.number)
            incoming = channels.get((stage - direction, stage))
            outgoing = channels.get((stage, stage + direction))
            if not computed[stage] and incoming is not None:
                if not incoming or incoming[0] != tensor:
                    return False
                incoming.popleft()
            computed[stage] = True
            if outgoing is not None:
                if len(outgoing) >= capacity:
                    return False
                outgoing.append(tensor)
        computed[stage] = False
        position[stage] += 1
        return True

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(stages):
            while position[stage] < len(actions):
                before = computed[stage]
                done = advance(stage)
                moved |= done or computed[stage] != before
                if not done:
                    break
    return all(p == len(actions) for p, actions in zip(position, stages, strict=True))
