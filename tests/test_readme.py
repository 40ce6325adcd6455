"""README.md promises nothing that is not there: examples run, commands, flags, targets and files exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from muxtune.cli.app import app
from muxtune.plan import HTask, Parallelism, Plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES, plan_problem
from muxtune.schedule import Action
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import make_problem

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
LINES = [line for language, text in FENCES if language == "sh" for line in text.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES] + [
    span.split() for span in SPANS if span.startswith(("muxtune ", "make ", "python "))
]

WRITTEN = (".venv/", "runs/", "docs/gpu-report.md")
"""Files of the README that a command of the README writes."""


def example(name: str) -> str:
    """The block behind the comment ``<!-- example: name -->``."""
    (text,) = re.findall(rf"^<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)^```$", README, re.M | re.S)
    return text


def commands_of(program: str) -> list[list[str]]:
    return [words[words.index(program) + 1 :] for words in COMMANDS if program in words]


@pytest.mark.slow
@pytest.mark.integration
def test_the_python_example_prints_what_the_readme_says(tmp_path):
    for name in ("workload.yaml", "loop.py"):
        (tmp_path / name).write_text(example(name))
    ended = subprocess.run(
        [sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert shape(ended.stdout) == shape(example("loop.out"))
    assert float(ended.stdout.split()[-1]) < 1e-5
    assert {path.name for path in (tmp_path / "run" / "tasks").iterdir()} == {"reviews", "questions"}


def shape(output: str) -> str:
    """Output with every number blanked out."""
    return re.sub(r"\b\d[\d.]*(e-?\d+)?", "#", output)


def test_the_python_example_is_about_fifteen_lines():
    assert sum(bool(line) for line in example("loop.py").splitlines()) <= 17


@pytest.fixture
def by_length(monkeypatch):
    """The policy of the README under its name, in a registry that is as before afterwards."""
    module = ModuleType("my_policies")
    exec(example("my_policies.py"), module.__dict__)
    assert re.search(r'^by-length = "my_policies:ByLength"$', README, re.MULTILINE)
    POLICIES.names()  # entry points are loaded now, not into the copy
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    POLICIES.register("by-length")(module.ByLength)
    return POLICIES.get("by-length")


def test_the_policy_example_plans(by_length):
    plan = plan_problem(make_problem(), policy="by-length", options=PlanOptions())[0]
    assert plan.policy == "by-length"
    assert len(plan.htasks) == 3
    for htask in plan.htasks:
        assert len({plan.tasks_by_id[task_id].max_length for task_id in htask.task_ids}) == 1
    with pytest.raises(SpecError, match="by-length decides the fusion itself"):
        plan_problem(make_problem(), policy="by-length", options=PlanOptions(partition="t0+t1"))


def test_the_excerpt_of_a_plan_has_its_fields():
    excerpt = json.loads(example("plan.json"))
    assert excerpt.keys() <= Plan.model_fields.keys()
    Parallelism.model_validate(excerpt["parallelism"])
    htasks = [HTask.model_validate(entry) for entry in excerpt["htasks"]]
    assert [set(entry) for entry in excerpt["htasks"]] == [set(HTask.model_fields)] * len(htasks)
    actions = [[Action(*entry) for entry in stage] for stage in excerpt["schedule"]]
    assert [len(stage) for stage in actions] == [8, 8]
    assert {action.htask for action in actions[0]} == {htask.id for htask in htasks}


@pytest.mark.parametrize("words", commands_of("muxtune"), ids=" ".join)
def test_commands_and_their_flags_exist(words):
    command, *rest = words
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for flag in (word for word in rest if word.startswith("--")):
        assert re.search(rf"^ +{flag}\b", shown.output, re.MULTILINE), f"{command} has no {flag}"


def test_flags_alone_belong_to_a_command():
    helps = [
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for name in ("plan", "compare", "run", "validate")
    ]
    for span in SPANS:
        if span.startswith("--"):
            assert any(re.search(rf"^ +{span.split()[0]}\b", text, re.MULTILINE) for text in helps), span


def test_make_targets_exist():
    targets = {words[0] for words in commands_of("make")}
    assert {"demo", "test", "gpu-check"} <= targets
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


def test_files_exist():
    words = {word.removeprefix("ARGS=") for words in [*COMMANDS, *map(str.split, SPANS)] for word in words}
    paths = {word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", word)}
    paths |= {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    missing = {path for path in paths if not path.startswith(WRITTEN) and not (ROOT / path).exists()}
    assert not missing
    assert {"runtime/peft/lora.py", "docs/design.md", "LICENSE"} <= paths


@pytest.mark.parametrize("words", [w for w in commands_of("python") if w], ids=" ".join)
def test_scripts_know_their_flags(words):
    option, module, *rest = words
    assert option == "-m", words
    script = module.replace(".", "/")
    # The commands of a package are in its modules.
    files = (ROOT / script).glob("*.py") if (ROOT / script).is_dir() else [ROOT / f"{script}.py"]
    text = "".join(file.read_text() for file in files)
    for flag in (word for word in rest if word.startswith("--")):
        assert f'add_argument("{flag}"' in text, f"{script} has no {flag}"
