"""Micro-batches of a plan: what each step holds, and whether it has room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muxtune.model import PRESETS
from muxtune.plan import Plan
from muxtune.support.errors import SpecError
from muxtune.tasks import Example, Workload
from runtime.data.faults import Faults
from runtime.data.feed import Feed, check_room, load_plan_data
from tests.helpers import make_plan, make_task, write_examples
from tests.plans import changed


@pytest.fixture
def plan(tmp_path) -> Plan:
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=i), steps=steps)
        for i, (name, steps) in enumerate([("a", 2), ("b", 4)])
    )
    return make_plan(Workload(tasks=tasks), PRESETS["llama-tiny"], partition=[["a", "b"]])


def test_a_step_holds_every_target_of_every_task_once(plan):
    data = load_plan_data(plan)
    feed = Feed(plan, data)
    for step in range(2):
        batches = [feed.microbatch(0, step * 2 + i) for i in range(2)]
        expected = feed.target_tokens(0, step)
        assert expected == {i: sum(e.target_tokens for e in data[i].batch(step)) for i in ("a", "b")}
        for k, task_id in enumerate(("a", "b")):
            spans = [batch.target_spans[k] for batch in batches]
            assert sum(stop - start for start, stop in spans) == expected[task_id]


def test_a_finished_task_leaves_the_stream(plan):
    feed = Feed(plan, load_plan_data(plan))
    assert feed.tokens(0, 1) == plan.htasks[0].tokens_per_microbatch
    assert 0 < feed.tokens(0, 2) < plan.htasks[0].tokens_per_microbatch
    batch = feed.microbatch(0, 4)
    assert len(batch.tokens_T) == feed.tokens(0, 2)
    assert batch.task_ids == ("b",)
    assert list(feed.target_tokens(0, 2)) == ["b"]


def _targets(task_id: str, batches) -> list[int]:
    """Predicted tokens of a task, in any order."""
    return sorted(
        token
        for batch in batches
        for own, span in zip(batch.task_ids, batch.target_spans, strict=True)
        if own == task_id
        for token in batch.target_ids_N[slice(*span)].tolist()
    )


def test_a_task_that_leaves_before_its_end_is_dealt_out_no_more_and_the_stream_gets_shorter_later(tmp_path):
    """Messages of two steps may be posted by the time that a rank learns of it."""
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=i), steps=steps)
        for i, (name, steps) in enumerate([("a", 9), ("b", 7)])
    )
    plan = make_plan(Workload(tasks=tasks), PRESETS["llama-tiny"], partition=[["a", "b"]])
    feed, undisturbed = (Feed(plan, load_plan_data(plan)) for _ in range(2))
    before = [feed.tokens(0, step) for step in range(9)]
    feed.leave("a", 3)
    after = [feed.tokens(0, step) for step in range(9)]
    assert after[:5] == before[:5]
    assert all(0 < after[step] < before[step] for step in (5, 6))
    assert after[7:] == [0, 0]
    for step in range(9):
        assert list(feed.target_tokens(0, step)) == ["a"] * (step < 3) + ["b"] * (step < 7)
        batches = [feed.microbatch(0, 2 * step + position) for position in range(2)]
        assert {len(batch.tokens_T) for batch in batches} == {after[step]}
        expected = [undisturbed.microbatch(0, 2 * step + position) for position in range(2)]
        assert _targets("b", batches) == _targets("b", expected)
    assert feed.step_tokens(8).all == feed.step_tokens(8).effective == 0


def _feed_whose_b_breaks(plan: Plan, monkeypatch, examples) -> Feed:
    """From step 1 on, ``b`` reads something else."""
    data = load_plan_data(plan)
    batch = data["b"].batch
    monkeypatch.setattr(data["b"], "batch", lambda step: examples(batch(step)) if step else batch(step))
    return Feed(plan, data, faults=Faults(rank=3))


def _raising(_examples):
    raise OSError("the\ndisk is gone")


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        (_raising, "OSError: the disk is gone (rank 3)"),
        (
            lambda examples: [Example(each.tokens + 1000, each.target_start) for each in examples],
            "UserError: token 1",
        ),
        (
            lambda examples: [Example(-each.tokens - 1, each.target_start) for each in examples],
            "UserError: token -",
        ),
        (
            lambda examples: [Example(each.tokens[:-1], each.target_start) for each in examples],
            "UserError: the data has changed: an example has",
        ),
    ],
    ids=["gone", "above", "below", "shorter"],
)
def test_data_that_breaks_is_its_tasks_fault_and_nobody_lies_elsewhere(plan, monkeypatch, examples, words):
    feed, undisturbed = _feed_whose_b_breaks(plan, monkeypatch, examples), Feed(plan, load_plan_data(plan))
    for step in range(4):
        for position in range(2):
            found, expected = (each.microbatch(0, 2 * step + position) for each in (feed, undisturbed))
            assert (found.spans, found.target_spans) == (expected.spans, expected.target_spans)
            for task_id, span in zip(found.task_ids, found.spans, strict=True):
                same = found.tokens_T[span.start : span.stop].equal(expected.tokens_T[span.start : span.stop])
                assert same == (task_id == "a" or step == 0)
        assert feed.faults.met(["a", "b"], step) == [False, step > 0]
    assert feed.faults.words("b", 1).startswith(words)


def test_a_task_can_be_left_out_of_a_micro_batch_and_the_others_lie_where_they_did(plan):
    feed = Feed(plan, load_plan_data(plan))
    whole, without = feed.microbatch(0, 1), feed.microbatch(0, 1, without=["a"])
    a, b = whole.spans
    assert without.spans == (replace(a, stop=a.start), b)
    assert without.task_ids == whole.task_ids
    assert without.tokens_T[b.start : b.stop].equal(whole.tokens_T[b.start : b.stop])
    assert not without.tokens_T[a.start : a.stop].any()
    assert without.target_spans[0] == (0, 0)
    assert len(without.target_ids_N) == whole.target_spans[1][1] - whole.target_spans[1][0]


def test_tokens_of_an_iteration_are_counted_in_three_ways(plan):
    data = load_plan_data(plan)
    feed = Feed(plan, data)
    tokens = feed.step_tokens(2)
    assert tokens.all == 2 * len(feed.microbatch(0, 4).tokens_T)
    assert tokens.billed == 4 * 32
    assert tokens.effective == sum(len(e.tokens) for e in data["b"].batch(2))


def test_replicas_share_the_sequences_of_every_step(plan):
    mesh = plan.parallelism.model_copy(update={"pp": 1, "dp": 2})
    plan = changed(plan, parallelism=mesh)
    data = load_plan_data(plan)
    check_room(plan, data, "plan")
    feeds = [Feed(plan, data, replica=replica) for replica in range(2)]
    for step in range(2):
        batches = [feed.microbatch(0, 2 * step + i) for feed in feeds for i in range(2)]
        assert {len(batch.tokens_T) for batch in batches} == {feeds[0].tokens(0, step)}
        expected = {i: sum(e.target_tokens for e in data[i].batch(step)) for i in ("a", "b")}
        for feed in feeds:
            assert feed.target_tokens(0, step) == expected  # a loss is over the global batch
        for k, task_id in enumerate(("a", "b")):
            spans = [batch.target_spans[k] for batch in batches]
            assert sum(stop - start for start, stop in spans) == expected[task_id]
        targets = sum(len(batch.target_ids_N) for batch in batches[:2])
        assert 0 < targets < sum(expected.values())  # neither replica has all of them
    assert feeds[0].step_tokens(0).all == 4 * feeds[0].tokens(0, 0)


def test_an_htask_whose_tasks_have_all_finished_has_no_tokens(plan):
    feed = Feed(plan, load_plan_data(plan))
    assert feed.tokens(0, 4) == 0
    assert feed.step_tokens(4).all == 0


def test_a_stream_too_short_for_its_sequences_is_refused(plan):
    htask = plan.htasks[0]
    short = htask.model_copy(update={"tokens_per_microbatch": htask.tokens_per_microbatch - 1})
    shorter = changed(plan, htasks=(short,))
    with pytest.raises(
        SpecError, match=r"plan: derived\.htasks\[0\].tokens_per_microbatch = \d+: expected at least"
    ):
        check_room(shorter, load_plan_data(plan), "plan")


def test_attention_is_by_the_backend_of_the_plan(plan):
    execution = plan.execution.model_copy(update={"attention": "loop"})
    data = load_plan_data(plan)
    groups = {}
    for each in (plan, changed(plan, execution=execution)):
        batch = Feed(each, data).microbatch(0, 0)
        groups[each.execution.attention] = batch.attention.placement.layout.groups
    assert all(group.rows == 1 for group in groups["loop"])
    assert len(groups["loop"]) > len(groups["grouped"])
