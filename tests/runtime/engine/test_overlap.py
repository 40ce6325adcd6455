"""Clocks whose actions take turns, without processes: ranks are threads that sum through shared memory."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from muxtune.orchestration import LaunchSegment
from muxtune.schedule import Action
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard
from runtime.distributed.teams import StageTeam
from runtime.engine.overlap import Overlap
from runtime.ops.deferred import side_work
from runtime.tasks.gradients import sum_over_shards
from runtime.tasks.tenant import Tenant
from tests.runtime.backbone.test_sharded_stage import random_weights
from tests.runtime.worlds import LLAMA, lay_out, make_task, make_tenant

A, B = Action("F", 0, 0), Action("F", 3, 0)


def main(htask: int, number: int = 0) -> LaunchSegment:
    return LaunchSegment(htask, number, side=False)


def side(htask: int, number: int) -> LaunchSegment:
    return LaunchSegment(htask, number, side=True)


@dataclass
class Instant:
    """A team of one rank, which tells when sums are launched and waited for."""

    events: list[str]

    def launch(self, tensor: Tensor, op: object):
        name = int(tensor)
        self.events.append(f"launch {name}")
        return lambda: self.events.append(f"wait {name}")


@pytest.fixture
def events():
    return []


@pytest.fixture
def spans():
    return []


@pytest.fixture
def team(events):
    return StageTeam(Instant(events))


@pytest.fixture
def overlap(team, spans):
    overlap = Overlap(team, lambda action, start_ns: spans.append(action))
    yield overlap
    overlap.close()


def sums(team, events, name: str, numbers: list[int]):
    def body():
        events.append(f"{name} begins")
        for number in numbers:
            team.sum_(torch.tensor(number))
        events.append(f"{name} ends")

    return body


def test_one_action_computes_while_the_sum_of_the_other_is_under_way(overlap, team, events, spans):
    bodies = {A: sums(team, events, "A", [1]), B: sums(team, events, "B", [2])}
    overlap.play(bodies, [main(0), main(3), main(0, 1), main(3, 1)])
    assert events == ["A begins", "launch 1", "B begins", "launch 2", "wait 1", "A ends", "wait 2", "B ends"]
    assert spans == [A, B, A, B]
    first, second = team.collectives
    assert (first.action, second.action) == (A, B)
    assert first.launched < second.launched < first.waited_from <= first.done
    exposed_ns = {each.action: each.done - each.waited_from for each in (first, second)}
    assert team.settle(wait=True) == exposed_ns
    assert team.settle(wait=True) == {}  # nothing is kept of what has been told


@pytest.mark.parametrize(
    "order",
    [
        [],
        [main(3)],
        [main(0)] * 5 + [side(0, 0)],
        [main(0), main(3)] * 4,
    ],
    ids=["nothing", "too little", "too much of one", "too much"],
)
def test_an_order_that_does_not_fit_is_followed_as_far_as_it_goes(overlap, team, events, order):
    overlap.play({A: sums(team, events, "A", [1, 2]), B: sums(team, events, "B", [3])}, order)
    assert sorted(events) == sorted(
        ["A begins", "B begins", "A ends", "B ends"]
        + [f"{what} {number}" for what in ("launch", "wait") for number in (1, 2, 3)]
    )


def test_an_empty_sum_and_a_maximum_give_nobody_a_turn(overlap, team, events):
    def body():
        team.sum_(torch.empty(0))
        team.max_(torch.tensor(7))
        events.append("A ends")

    overlap.play({A: body, B: lambda: events.append("B ends")}, [main(0), main(3)])
    assert events == ["launch 7", "wait 7", "A ends", "B ends"]


def test_side_work_waits_for_its_turn_or_for_the_end(overlap, team, events):
    def body():
        for number in (1, 2, 3):
            found = side_work()
            assert found is not None
            found.put(lambda number=number: events.append(f"side {number}"))
            team.sum_(torch.tensor(number))
        assert threading.current_thread() is not threading.main_thread()

    overlap.play({A: body}, [main(0), main(0, 1), side(0, 0), side(0, 1), main(0, 2)])
    assert [event for event in events if not event.startswith("wait")] == [
        "launch 1",
        "launch 2",
        "side 1",
        "side 2",
        "launch 3",
        "side 3",
    ]
    assert side_work() is None, "outside of a clock everything is done at once"


def test_an_error_ends_the_clock(overlap, team, events):
    def broken():
        team.sum_(torch.tensor(1))
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        overlap.play({A: broken, B: sums(team, events, "B", [2])}, [main(0), main(3), main(0)])
    assert team.pause is None
    assert "B ends" not in events


@dataclass
class Rendezvous:
    """Asynchronous sums of two threads: the n-th of one meets the n-th of the other."""

    ranks: int = 2
    there: threading.Condition = field(default_factory=threading.Condition)
    given: dict[int, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def member(self, rank: int) -> RendezvousMember:
        return RendezvousMember(self, rank)


@dataclass
class RendezvousMember:
    meeting: Rendezvous
    rank: int
    launched: int = 0

    def launch(self, tensor: Tensor, op: object):
        number, meeting = self.launched, self.meeting
        self.launched += 1
        with meeting.there:
            meeting.given[number][self.rank] = tensor.detach().clone()
            meeting.there.notify_all()

        def wait():
            with meeting.there:
                there = meeting.there.wait_for(
                    lambda: len(meeting.given[number]) == meeting.ranks, timeout=60
                )
            assert there, f"sum {number} was launched by one rank only"
            terms = [meeting.given[number][rank] for rank in range(meeting.ranks)]
            combined = torch.stack(terms)
            is_max = str(op).endswith("MAX")
            tensor.copy_(combined.amax(0) if is_max else combined.sum(0))

        return wait


def random_order(seed: int, turns: int) -> list[LaunchSegment]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(4, (turns,), generator=generator).tolist()
    return [LaunchSegment(draw % 2, i // 2, side=draw > 1) for i, draw in enumerate(draws)]


def train(spec, htasks, weights, shard, forward, backward):
    """Forward and backward of two hTasks on a shard, in turns or one after the other."""
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights, shard=shard)
    for tenants in htasks:
        for tenant in tenants:
            stage.add_task(tenant.task, tenant.adapter)
    batches = [
        build_microbatch(
            lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
        )
        for tenants in htasks
    ]
    outputs: dict[int, Tensor] = {}

    def run_forward(h: int):
        outputs[h] = stage.forward(batches[h], None).sum()

    clocks = [
        {Action("F", h, 0): (lambda h=h: run_forward(h)) for h in (0, 1)},
        {Action("B", h, 0): (lambda h=h: outputs[h].backward()) for h in (0, 1)},
    ]
    overlap = Overlap(shard.team, lambda action, start_ns: None)
    for bodies, order in zip(clocks, (forward, backward), strict=True):
        if order is None:
            for body in bodies.values():
                body()
        else:
            overlap.play(bodies, order)
    overlap.close()
    ours = [
        Tenant(t.task, stage.task_parameters(t.task.id), stage.task_portions(t.task.id))
        for ts in htasks
        for t in ts
    ]
    sum_over_shards(ours, shard.team)
    return [output.detach() for _, output in sorted(outputs.items())], [
        parameter.grad for tenant in ours for parameter in tenant.parameters.values()
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turns_in_any_order_change_no_bit(seed, tmp_path):
    def tenants(*names):
        tasks = [(make_task(name, r=r), lengths) for name, r, lengths in names]
        return [make_tenant(LLAMA, task, lengths, tmp_path / task.id) for task, lengths in tasks]

    htasks = [tenants(("a", 2, [3, 17]), ("b", 5, [9])), tenants(("c", 3, [12, 4]))]
    weights = random_weights(LLAMA)

    def play(forward, backward):
        meeting = Rendezvous()

        def rank(index: int):
            shard = Shard(index, 2, StageTeam(meeting.member(index)))
            return train(LLAMA, htasks, weights, shard, forward, backward)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))

    expected = play(None, None)
    found = play(random_order(seed, 40), random_order(seed + 10, 60))
    for (losses, gradients), (expected_losses, expected_gradients) in zip(found, expected, strict=True):
        assert all(map(torch.equal, losses, expected_losses))
        assert all(map(torch.equal, gradients, expected_gradients))
