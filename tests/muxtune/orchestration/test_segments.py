"""Values only: what a launcher on a host thread plays, from a plan's launch orders."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from muxtune.graph.operators import PHASES
from muxtune.model import PRESETS
from muxtune.orchestration import (
    MODES,
    Cut,
    LaunchOrder,
    LaunchSegment,
    action_cut,
    check_order,
    clock_segments,
    collectives,
    decode_turns,
    launch_graph,
    left_of,
    schedule_clock,
)
from muxtune.peft.lora import LoraSpec
from tests.muxtune.orchestration.graphs import chain
from tests.sim.plans import launched_plan

MODEL = PRESETS["llama-tiny"]
PHASE = {"F": "fwd", "B": "bwd"}


def lora(*targets: str) -> LoraSpec:
    return LoraSpec(method="lora", r=4, alpha=4, targets=targets)


@dataclass
class OneOrder:
    """A plan of one stage whose clocks all have one order."""

    order: LaunchOrder | None
    pefts: tuple[LoraSpec, ...] = (lora("q_proj"),)
    layers: int = 1

    def action_cut(self, stage: int, phase: str, htask: int) -> Cut:
        return action_cut(
            MODEL, self.layers, first=False, last=True, pefts=self.pefts, tokens=64, phase=phase, tp=2
        )

    def remaining_order(self, stage: int, phase: str, htasks: tuple[int, ...]) -> LaunchOrder | None:
        return self.order


def shown(segments: tuple[LaunchSegment, ...] | None) -> str:
    assert segments is not None
    return " ".join(f"{s.htask}.{s.number}{'s' if s.side else ''}" for s in segments)


def test_segments_stand_where_their_last_subgraphs_do():
    # Backward of a layer behind the head: head, MLP, attention, norm and message; q_proj has leaves beside.
    cut = OneOrder(None).action_cut(0, "bwd", 0)
    assert [each.sort for each in cut.subgraphs].count("communicate") == 3
    own = [each for each in cut.subgraphs if each.sort != "communicate"]
    leaves = [all(cut.leaves[node] for node in each.nodes) for each in own]
    side = leaves.index(True)
    assert leaves.count(True) == 1
    main = [number for number in range(len(own)) if number != side]
    late = " ".join(f"0:{number}" for number in [*main, side])
    plan = OneOrder(LaunchOrder("none", decode_turns(late), decode_turns("0:0-2")))
    check_order([cut], plan.order)
    assert shown(clock_segments(plan, 0, "bwd", (7,))) == "7.0 7.1 7.2 7.3 7.2s"
    # In time, it is done while the last sum is under way.
    early = " ".join(f"0:{number}" for number in range(len(own)))
    plan = OneOrder(LaunchOrder("none", decode_turns(early), decode_turns("0:0-2")))
    assert shown(clock_segments(plan, 0, "bwd", (7,))) == "7.0 7.1 7.2 7.2s 7.3"


def test_what_only_waits_for_the_loss_comes_late():
    """The forward of the last stage ends with a sum: the empty segment behind it lets others go first."""
    cut = OneOrder(None).action_cut(0, "fwd", 0)
    count = sum(each.sort != "communicate" for each in cut.subgraphs)
    turns = decode_turns(" ".join(f"0:{n} 1:{n}" for n in range(count)))
    plan = OneOrder(LaunchOrder("none", turns, decode_turns("0:0 1:0 0:1 1:1 0:2 1:2")))
    assert shown(clock_segments(plan, 0, "fwd", (0, 1))) == "0.0 1.0 0.1 1.1 0.2 1.2 0.3 1.3"
    barred = decode_turns(f"0:0-{count - 1} 1:0-{count - 1}")
    plan = OneOrder(LaunchOrder("htask", barred, decode_turns("0:0-2 1:0-2")))
    assert shown(clock_segments(plan, 0, "fwd", (0, 1))) == "0.0 0.1 0.2 0.3 1.0 1.1 1.2 1.3"


def test_without_an_order_or_without_overlap_there_is_nothing_to_follow():
    assert clock_segments(OneOrder(None), 0, "fwd", (0,)) is None
    assert clock_segments(OneOrder(LaunchOrder("launch", (), ())), 0, "fwd", (0,)) is None


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("pp", [1, 2])
def test_segments_of_a_plan_are_whole_and_ascend(mode, pp):
    plan = launched_plan(mode, pp=pp)
    for kind, htasks in plan.clock_kinds:
        for stage in range(pp):
            segments = clock_segments(plan, stage, PHASE[kind], htasks)
            assert segments is not None
            for h in htasks:
                own = [s for s in segments if s.htask == h]
                main = [s.number for s in own if not s.side]
                assert main == list(range(collectives(plan, stage, PHASE[kind], h) + 1))
                sides = [s for s in own if s.side]
                assert bool(sides) == (kind == "B")
                assert len(set(sides)) == len(sides)
                for each in sides:
                    assert own.index(each) > own.index(LaunchSegment(h, each.number, side=False))


def test_interleaved_clocks_overlap_and_keep_gradients_of_factors_for_later():
    plan = launched_plan("interleaved", pp=1)
    segments = clock_segments(plan, 0, "bwd", (0, 2))
    assert [s.htask for s in segments[:6]] == [0, 2, 0, 2, 0, 2]
    first_side = next(i for i, s in enumerate(segments) if s.side)
    assert segments[first_side].number < max(s.number for s in segments[:first_side] if not s.side)


def test_htasks_that_have_finished_leave_the_order():
    plan = launched_plan("interleaved", pp=1)
    both = clock_segments(plan, 0, "bwd", (0, 2))
    left = clock_segments(plan, 0, "bwd", (2,))
    assert set(left) == {s for s in both if s.htask == 2}
    order = plan.launch_order(0, "bwd", (0, 2))
    check_order([plan.action_cut(0, "bwd", 2)], left_of(order, (0, 2), (2,)))
    assert plan.launch_order(0, "bwd", (2,)) is None
    assert clock_segments(plan, 0, "bwd", (1, 2)) is None


@pytest.mark.parametrize(
    ("targets", "first_layer"),
    [
        (("q_proj",), 1),
        (("o_proj",), 1),
        (("gate_proj",), 0),
        (("down_proj",), 0),
        (("all-linear",), 1),
    ],
)
def test_collectives_of_a_backward_end_with_the_first_adapter(targets, first_layer):
    def count(phase, *, first, last):
        cut = action_cut(
            MODEL, 3, first=first, last=last, pefts=(lora(*targets),), tokens=8, phase=phase, tp=2
        )
        return sum(each.sort == "communicate" for each in cut.subgraphs)

    assert count("fwd", first=True, last=True) == 1 + 2 * 3 + 1
    assert count("fwd", first=False, last=False) == 2 * 3
    assert count("bwd", first=False, last=True) == 1 + 2 * 3
    assert count("bwd", first=True, last=False) == first_layer + 2 * 2


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("adapters", ["grouped", "separate"])
def test_the_nominal_cut_is_that_of_the_priced_graph(phase, adapters):
    """The planner's graphs have averages of targets and attention, and an action's fixed cost."""
    plan = launched_plan("interleaved", pp=2, adapters=adapters)
    for kind, htasks in plan.clock_kinds:
        for stage in range(2):
            order = plan.launch_order(stage, PHASE[kind], htasks)
            cuts = [plan.action_cut(stage, PHASE[kind], h) for h in htasks]
            check_order(cuts, order)
            assert len(order.compute) == sum(stream == 0 for cut in cuts for stream in cut.streams)
    assert all(cut.subgraphs for cut in (plan.action_cut(0, phase, h) for h in range(3)))


def test_an_order_of_another_clock_is_not_mistaken_for_it():
    schedule = schedule_clock([launch_graph(chain(1.0, 2.0, 1.0))], "interleaved")
    with pytest.raises(ValueError, match="every subgraph once"):
        check_order([OneOrder(None).action_cut(0, "bwd", 0)], schedule.order)
