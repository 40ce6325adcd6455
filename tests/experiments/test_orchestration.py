"""Values only: the acceptance bar on shipped costs, and what the experiment prints and draws."""

import random

import pytest

from experiments.orchestration import (
    STATED,
    a40_costs,
    clock_table,
    draw_clock,
    htask_graph,
    orchestration_rows,
    random_clock,
    ratio_rows,
    ratio_table,
)
from muxtune.orchestration import MODES, launch_graph, schedule_clock
from muxtune.support.errors import UserError


@pytest.fixture(scope="module")
def costs():
    return a40_costs()


def test_the_median_of_100_random_clocks_is_within_5_percent_of_the_lower_bound(costs):
    rows = list(ratio_rows(costs, modes=("interleaved",)))
    assert [(row.tp, row.phase) for row in rows] == [(2, "fwd"), (2, "bwd"), (4, "fwd"), (4, "bwd")]
    for row in rows:
        assert row.clocks == 100
        assert 1 - 1e-9 <= row.median <= 1.05
        assert 1 - 1e-9 <= row.operator_median <= 1.05
        assert row.worst <= 1.15


@pytest.mark.parametrize("contention", [0.0, 0.25])
def test_orchestration_hides_most_of_the_stated_clocks_communication(costs, contention):
    rows = list(orchestration_rows(costs, contention))
    assert len(rows) == 2 * 2 * len(MODES)
    for start in range(0, len(rows), len(MODES)):
        of = {row.mode: row for row in rows[start : start + len(MODES)]}
        ours, none = of["interleaved"], of["sequential"]
        assert none.exposed_communication_s == pytest.approx(none.communication_s)
        assert ours.exposed_communication_s <= 0.1 * ours.communication_s
        assert ours.lower_bound_s <= ours.clock_s <= 1.05 * ours.lower_bound_s
        assert ours.clock_s <= of["round-robin"].clock_s <= of["intra"].clock_s <= none.clock_s * (1 + 1e-9)
    assert "interleaved" in clock_table(rows)


def test_a_forward_alone_overlaps_nothing_and_a_backward_its_factors_gradients(costs):
    for phase, hidden in (("fwd", False), ("bwd", True)):
        alone = schedule_clock([launch_graph(htask_graph(costs, STATED[1], phase, 2))], "intra")
        assert (alone.exposed_communication_s < 0.9 * alone.bounds.communication_s) == hidden


def test_random_clocks_are_those_of_the_seed_and_as_described():
    clocks = [random_clock(random.Random(3)) for _ in range(2)]
    assert clocks[0] == clocks[1]
    draw = random.Random(5)
    works = [work for _ in range(50) for work in random_clock(draw)]
    assert 100 <= len(works) <= 200
    for work in works:
        assert 64 <= work.tokens <= 4096
        assert sum(work.task_tokens) == work.tokens == work.attention[0][1] * work.attention[0][2]
        assert all(4 <= lora.r <= 64 and 1 <= len(lora.targets) <= 7 for lora in work.pefts)


def test_rows_of_random_clocks_repeat(costs):
    first, second = (list(ratio_rows(costs, 0.2, clocks=2, seed=1, modes=("interleaved",))) for _ in range(2))
    assert first == second
    assert "interleaved" in ratio_table(first)


def test_a_clock_is_drawn(costs, tmp_path):
    graphs = [launch_graph(htask_graph(costs, work, "fwd", 4, 1)) for work in STATED]
    out = tmp_path / "clock.png"
    draw_clock([(mode, schedule_clock(graphs, mode)) for mode in ("sequential", "interleaved")], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"ends in \.png"):
        draw_clock([("x", schedule_clock(graphs, "intra"))], tmp_path / "clock.txt")
