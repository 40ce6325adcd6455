"""Long modules begin, and what shares solo runs shares a worker."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.documents import ROOT
from tests.scheduling import BESIDE_SOLO_RUNS, RUNS, longest_first, scope_of


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def uses_shared_bench(path: Path) -> bool:
    """Whether a module has the bench of the session, and none of its own."""
    functions = functions_of(path)
    wanted = {argument.arg for function in functions for argument in function.args.args}
    return bool(wanted & {"bench", "solo_bench"} - {function.name for function in functions})


def test_all_modules_that_compare_with_the_same_solo_runs_share_a_worker():
    modules = {f"{RUNS}{path.name}" for path in (ROOT / RUNS).glob("test_*.py") if uses_shared_bench(path)}
    assert modules == BESIDE_SOLO_RUNS
    assert len({scope_of(f"{module}::test_it") for module in modules}) == 1


def test_other_modules_stay_whole_and_apart():
    nodeids = [
        f"{RUNS}test_launch.py::test_a[b::c]",
        f"{RUNS}test_launch.py::test_d",
        "tests/sim/test_e.py::f",
    ]
    assert [scope_of(nodeid) for nodeid in nodeids] == [
        f"{RUNS}test_launch.py",
        f"{RUNS}test_launch.py",
        "tests/sim/test_e.py",
    ]


class Item:
    def __init__(self, nodeid: str, slow: bool = False) -> None:
        self.nodeid = nodeid
        self.slow = slow

    def get_closest_marker(self, name: str) -> bool:
        return name == "slow" and self.slow


def test_runs_begin_then_slow_modules_and_short_ones_end():
    short = Item("tests/benchmarks/test_a.py::test_one")
    stop = Item(f"{RUNS}test_stop.py::test_two")
    parity = Item(f"{RUNS}test_parity.py::test_three")
    quick, slow = (Item(f"tests/muxtune/test_b.py::{name}", name == "slow") for name in ("quick", "slow"))
    last = Item("tests/sim/test_c.py::test_four")
    ordered = longest_first([short, stop, parity, quick, slow, last])
    assert ordered == [parity, stop, quick, slow, short, last]
