"""Policies of a user's own file, as ``--policy FILE.py:CLASS``."""

from __future__ import annotations

import json

import pytest
import yaml

from muxtune.policies import choose_policy, policy_identity
from muxtune.support.errors import SpecError, UserError
from muxtune.support.registry import PluginError
from tests.muxtune.cli.conftest import cli  # noqa: F401  # a fixture

SOURCE = """
from dataclasses import dataclass
from pydantic import BaseModel
from muxtune.policies import fixed_partition

@dataclass(frozen=True)
class Widths:
    summary: str = "so many tasks per hTask"

    class Options(BaseModel):
        width: int = {width}

    def propose(self, problem, options):
        width, ids = options.policy_options.width, [task.id for task in problem.tasks]
        groups = [tuple(ids[i : i + width]) for i in range(0, len(ids), width)]
        return fixed_partition(problem, options, groups)

class Broken(Widths):
    def propose(self, problem, options):
        raise KeyError("nothing here")

class Unmade(Widths):
    def __init__(self):
        raise ValueError("needs a table")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE.format(width=2))
    return tmp_path / "mine.py"


@pytest.fixture
def workload(tmp_path):
    task = {
        "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_length": 64,
        "learning_rate": 1.0e-3,
        "steps": 4,
    }
    content = {"backbone": "llama2-7b", "tasks": [task | {"id": f"t{i}"} for i in range(4)]}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "w.yaml"


def test_the_command_line_takes_it_with_its_options(cli, file, workload):  # noqa: F811
    fixed = ("plan", "--workload", workload, "--cluster", "testbed-a", "--json", "--policy")
    for more, sizes in (((), [2, 2]), (("--policy-option", "width=3"), [3, 1])):
        result = cli(*fixed, f"{file}:Widths", *more)
        assert result.code == 0, result.err
        decisions = json.loads(result.out)["decisions"]
        assert decisions["policy"] == "Widths"
        assert [len(htask["task_ids"]) for htask in decisions["htasks"]] == sizes


def test_a_broken_one_costs_its_own_row_of_a_comparison_only(cli, file, workload):  # noqa: F811
    names = f"nemo,{file}:Widths,{file}:Broken"
    result = cli("compare", "--workload", workload, "--cluster", "testbed-a", "--policies", names, "--json")
    assert result.code == 0, result.err
    rows = {row["policy"]: row for row in json.loads(result.out)["policies"]}
    assert set(rows) == {"nemo", "Widths", "Broken"}
    assert rows["Widths"]["refused"] is None
    assert "propose raised KeyError: 'nothing here' (mine.py:" in rows["Broken"]["refused"]


def test_a_sweep_takes_it_from_its_own_folder_and_sees_an_edit(cli, file, workload, tmp_path):  # noqa: F811
    sweep = {"workload": "w.yaml", "cluster": "testbed-a", "grid": {"policy": ["nemo", "mine.py:Widths"]}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
    command = ("sweep", tmp_path / "s.yaml", "--out", tmp_path / "s.parquet", "--jobs", 1, "--json")
    assert cli(*command).json["planned"] == 2
    before = policy_identity(f"{file}:Widths")
    file.write_text(SOURCE.format(width=3))
    assert policy_identity(f"{file}:Widths") != before
    refused = cli(*command, "--resume")
    assert refused.code == 2
    assert "1 of the 2 finished points" in refused.err


def test_an_edited_file_is_read_again(file):
    assert choose_policy(f"{file}:Widths").options_model().width == 2
    file.write_text(SOURCE.format(width=5))
    assert choose_policy(f"{file}:Widths").options_model().width == 5


def test_what_is_wrong_with_it_names_the_file(file, tmp_path):
    with pytest.raises(UserError, match=r"no\.py"):
        choose_policy(f"{tmp_path}/no.py:Widths")
    with pytest.raises(SpecError, match=r"mine\.py = 'Width': expected one of Widths, Broken, Unmade"):
        choose_policy(f"{file}:Width")
    with pytest.raises(PluginError, match=r"'Unmade' of .*mine\.py: making it raised ValueError: needs a"):
        choose_policy(f"{file}:Unmade")
    (tmp_path / "bad.py").write_text("import nowhere_at_all\n")
    with pytest.raises(PluginError, match=r"bad\.py: loading it raised ModuleNotFoundError"):
        choose_policy(f"{tmp_path / 'bad.py'}:Widths")
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(SpecError, match="expected a class with `propose`"):
        choose_policy(f"{tmp_path / 'none.py'}:Widths")


def test_a_wrong_objective_is_refused_before_anything_is_measured(cli, workload, monkeypatch):  # noqa: F811
    def measured(*_, **__):
        raise AssertionError("costs were looked for in vain")

    monkeypatch.setattr("muxtune.cli.planning.find_costs", measured)
    result = cli("plan", "--workload", workload, "--objective", "speed")
    assert result.code == 2
    assert "--objective = 'speed'" in result.err
