"""Streams of all groups at once against the shape of each group."""

from __future__ import annotations

import numpy as np
import pytest

from muxtune.batches import chunked_sizes, step_group_tokens
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.decisions.structure import Layout
from muxtune.planning.estimate.group_seconds import GroupBands
from muxtune.planning.estimate.stream_tokens import (
    band_max,
    band_sum,
    dealt_lengths,
    load_batches,
    sampled_steps,
)
from muxtune.planning.problem.problem import PlanningProblem
from tests.muxtune.planning.problems import make_problem

UNEVEN = (
    {"dataset": {"lengths": "rte"}, "max_length": 200, "micro_batch_size": 2, "steps": 7},
    {"dataset": {"lengths": "sst2"}, "max_length": 64, "global_batch_size": 6, "micro_batch_size": 2},
    {"dataset": {"lengths": "openbookqa"}, "max_length": 96, "steps": 2},
    {"dataset": {"lengths": "sst2"}, "max_length": 40, "global_batch_size": 16, "micro_batch_size": 16},
    {"dataset": {"lengths": "openbookqa"}, "max_length": 128, "micro_batch_size": 1, "steps": 5},
    {"dataset": {"lengths": "sst2"}, "max_length": 64, "global_batch_size": 5, "micro_batch_size": 1},
)
"""Tasks that differ in steps, batches, micro-batches and lengths."""


LAYOUTS = [
    Layout("pack"),
    Layout("pad"),
    Layout("chunk", 32),
    Layout("chunk", 256),
    Layout("chunk", 16, 2),
    Layout("chunk", 64, 4),
]


def all_steps(problem: PlanningProblem) -> np.ndarray:
    return np.arange(max(task.steps for task in problem.tasks))


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_of_every_group_equal_its_shape(layout, dp):
    problem = make_problem(UNEVEN)
    order = list(problem.data)
    bands = GroupBands(problem, order, len(order), [layout], all_steps(problem))
    band = bands.layout_band(bands.layouts[0], dp)
    microbatches = bands.microbatches_nw(dp)
    seen = 0
    for end in range(len(order)):
        for w in range(end + 1):
            group = order[end - w : end + 1]
            shape = problem.shape(group, *layout, dp=dp)
            assert band.tokens_nw[end, w] == shape.tokens
            assert microbatches[end, w] * shape.carry == shape.microbatches
            seen += 1
    assert seen >= len(order)


def test_bands_end_at_the_widest_group():
    problem = make_problem(UNEVEN)
    order = list(problem.data)
    pack = Layout("pack")
    whole = GroupBands(problem, order, len(order), [pack]).layout_band(pack, 1)
    narrow = GroupBands(problem, order, 3, [pack]).layout_band(pack, 1)
    assert narrow.tokens_nw.shape == (6, 3)
    np.testing.assert_array_equal(narrow.tokens_nw, whole.tokens_nw[:, :3])


@pytest.mark.parametrize("chunk", [16, 40, 256])
def test_chunks_of_many_groups_equal_those_of_each(chunk):
    problem = make_problem(UNEVEN)
    tasks = list(problem.data.values())
    steps = np.arange(2)
    sizes = chunked_sizes(dealt_lengths(load_batches(tasks, steps), 4), chunk)
    for position, data in enumerate(tasks):
        np.testing.assert_array_equal(sizes[position], step_group_tokens(data, "chunk", 4, chunk)[:2])


def test_a_long_run_is_sampled_from_end_to_end_with_all_of_a_short_one():
    problem = make_problem([{"steps": 1000}, {"steps": 3}])
    steps = sampled_steps(list(problem.data.values()), DEFAULT_SETTINGS.sampled_steps)
    assert {0, 1, 2, 999} <= set(steps.tolist())
    assert len(steps) <= DEFAULT_SETTINGS.sampled_steps + 3


def test_bands_sum_and_take_the_maximum_over_each_group():
    values = np.array([3.0, 1.0, 4.0, 1.0])
    for end in range(4):
        for w in range(min(end + 1, 3)):
            group = values[end - w : end + 1]
            assert band_sum(values, 3)[end, w] == pytest.approx(group.sum())
            assert band_max(values, 3)[end, w] == group.max()
