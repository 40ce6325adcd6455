"""The ablation of the search, on one small instance."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from unittest.mock import patch

from benchmarks.search_ablation import (
    STAGES,
    TASKS,
    TESTBEDS,
    WHOLE,
    Search,
    ablate,
    ablation_table,
    draw_instances,
    main,
)
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS


def test_instances_are_of_all_testbeds_and_sizes():
    instances = draw_instances(30)
    assert {(each.tasks, each.testbed) for each in instances} == {(n, t) for n in TASKS for t in TESTBEDS}
    assert 0 < sum(each.memory < 1 for each in instances) < 15


def test_every_stage_is_another_search():
    assert DEFAULT_SETTINGS not in STAGES.values()
    assert len(set(STAGES.values())) == len(STAGES)


def test_a_search_without_a_stage_is_no_better_and_does_not_work_as_long():
    (instance,) = draw_instances(1)
    steps: list[None] = []
    found = ablate(instance, ["one bucket", "patience 3"], lambda: steps.append(None))
    assert len(steps) == len(found) == 3
    assert all(0 < search.cpu_s < 60 for search in found.values())
    for stage in ("one bucket", "patience 3"):
        assert found[stage].iteration_s >= found[WHOLE].iteration_s * (1 - 1e-9)


def test_the_table_has_what_was_lost():
    found = [
        {WHOLE: Search(2.0, 1.0), "less": Search(2.5, 0.5)},
        {WHOLE: Search(2.0, 1.0), "less": Search(2.0, 0.7)},
        {WHOLE: Search(2.0, 1.0), "less": Search(math.inf, 0.5)},
        {WHOLE: Search(math.inf, 1.0), "less": Search(math.inf, 1.0)},
    ]
    row = next(line for line in ablation_table(found).splitlines() if "less" in line)
    assert [cell.strip() for cell in row.strip("| ").split("|")] == [
        "less",
        "+25.00%",
        "+25.00%",
        "+25.00%",
        "67%",
        "0.50",
        "1",
    ]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    arguments = ["--instances", "1", "--stages", "no carry groups", "--out", str(rows)]
    with patch.object(sys, "argv", ["search_ablation", *arguments]):
        main()
        first = rows.read_text()
        with patch("benchmarks.search_ablation.measure", side_effect=AssertionError("measured again")):
            main()
    assert rows.read_text() == first
