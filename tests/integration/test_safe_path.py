"""A file in the current directory that is named like a module of Python is executed by no process of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from muxtune.model import PRESETS
from muxtune.plan import save_plan
from muxtune.tasks import Workload
from tests.helpers import make_plan, make_task, write_examples
from tests.muxtune.cli.conftest import task

pytestmark = pytest.mark.integration

_SHADOWED = ("random", "queue", "selectors", "tempfile", "uuid", "numbers")
"""Modules of Python that ranks and workers import sooner or later."""

# -P stands for the installed command, which has its own folder in front of the path and not the current one.
_MUXTUNE = [sys.executable, "-P", "-c", "from muxtune.cli.app import main; main()"]

_SWEEP = {
    "model": "llama2-7b",
    "cluster": "testbed-a",
    "workload": {"tasks": [task("a", steps=2)]},
    "grid": {"policy": ["sl-peft", "temporal-only"]},
}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A working directory with such files; each leaves a mark when it is executed."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in _SHADOWED:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write('{name} ')\nraise ImportError\n"
        )
    return folder


def _executed(directory: Path) -> str:
    mark = directory.parent / "executed"
    return mark.read_text() if mark.exists() else ""


def test_the_files_would_be_executed_where_python_looks_into_the_current_directory(directory):
    unsafe = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import random"], cwd=directory, capture_output=True, check=False, env=unsafe
    )
    assert done.returncode == 1
    assert _executed(directory) == "random "


def test_ranks_of_a_run_execute_none(directory, tmp_path):
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0), steps=1)
    plan = make_plan(Workload(tasks=(task,)), PRESETS["llama-tiny"], partition=[["a"]], template="flush")
    save_plan(plan, tmp_path / "plan.json")
    command = [*_MUXTUNE, "run", str(tmp_path / "plan.json"), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert _executed(directory) == ""
    assert done.returncode == 0, done.stderr


def test_workers_of_a_sweep_execute_none(directory, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(_SWEEP))
    paths = [str(tmp_path / name) for name in ("sweep.yaml", "r.parquet")]
    command = [*_MUXTUNE, "sweep", paths[0], "--out", paths[1], "--jobs", "2", "--json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert _executed(directory) == ""
    assert done.returncode == 0, done.stderr
