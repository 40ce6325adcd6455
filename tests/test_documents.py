"""The pages name nothing that is not there: links, paths, modules, commands and the glossary's names."""

from __future__ import annotations

import importlib
import re
from dataclasses import is_dataclass
from types import ModuleType
from typing import get_type_hints

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from experiments.sweep.specification import SweepSpec
from muxtune.batches import AlignmentReport
from muxtune.cli.app import app
from muxtune.cluster import ClusterSpec, DeviceSpec, LinkSpec
from muxtune.costs.ref import CostsRef
from muxtune.model import BackboneDigest, ModelSpec
from muxtune.peft.lora import LoraSpec
from muxtune.plan import (
    Decisions,
    Derived,
    Execution,
    HTaskDecision,
    MicrobatchShape,
    OrchestrationDecision,
    Parallelism,
    Plan,
    Predicted,
)
from muxtune.plan.by_hand import HandDecisions, HandHTask, HandParallelism
from muxtune.plan.launch_orders import ClockLaunches, StageLaunches
from muxtune.tasks import DatasetSpec, PeftTask, Workload
from runtime.reports.footprint import MeasuredMemory
from runtime.reports.report import RunReport, TokenTotals
from runtime.reports.validate import TaskValidation, ValidationReport
from runtime.tasks.outputs import TaskStatus
from tests.documents import ROOT, Page, load_page, load_pages
from tests.documents import WRITTEN as WRITTEN_PAGES

PAGES = load_pages()
MOST_WORDS = 3000
"""Of a page in docs."""

ROOMS = ("muxtune", "profiler", "sim", "runtime", "experiments", "benchmarks", "tests")
OURS = (*(f"{room}/" for room in (*ROOMS, "docs", "examples", "notebooks")), ".ci/")
"""Beginnings of paths in this repository."""
WRITTEN = ("runs/", ".venv/", *WRITTEN_PAGES)
"""Beginnings of paths that a command writes."""
FILES = (".json", ".parquet", ".py", ".toml")
NO_MODULES = {
    "muxtune.operators",
    "muxtune.runtime_peft",
    "muxtune.profile",
    "muxtune.overlaps",
    "muxtune.checkpoint",
    "muxtune.measurements",
}
"""Entry points, and keys of metadata."""
COVERED = {
    "docs/design.md": {"tests/integration/test_parity.py", "tests/sim/test_engine.py"},
    "docs/planning.md": {"muxtune/planning/search/search.py", "sim/search.py"},
    "docs/extending.md": {"profiler/devices.py", "muxtune/data/devices"},
    "README.md": {"runtime/peft/lora.py", "benchmarks/results", "examples/eight-tenants.yaml"},
}
"""Some paths that the pages name, so that a pattern that finds none is noticed."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_links_lead_to_files_and_headings(page):
    for link in page.links:
        target, _, anchor = link.partition("#")
        file = (ROOT / page.name).parent / target if target else ROOT / page.name
        assert file.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            other = load_page(str(file.resolve().relative_to(ROOT)))
            assert anchor in other.anchors, f"{page.name} links to {link}: {other.name} has no such heading"


def test_pages_link_to_each_other():
    linked = {page.name: page.links for page in PAGES}
    named = {
        str(((ROOT / name).parent / link.partition("#")[0]).resolve().relative_to(ROOT))
        for name, links in linked.items()
        for link in links
    }
    assert {page.name for page in PAGES} - {"README.md"} <= named
    assert "README.md" in named


@every_page
def test_paths_exist(page):
    missing = {
        path
        for path in page.paths
        if path.startswith(OURS) and not path.startswith(WRITTEN) and not (ROOT / path).exists()
    }
    assert not missing
    assert COVERED.get(page.name, set()) <= page.paths


@every_page
def test_tests_are_named_by_their_whole_path(page):
    """``test_engine.py`` alone would not be noticed when it moves."""
    assert not [span for span in page.spans if re.fullmatch(r"test_\w+\.py", span)]


@every_page
def test_modules_exist(page):
    for span in page.spans:
        is_name = re.fullmatch(rf"({'|'.join(ROOMS)})(\.\w+)+", span) and not span.endswith(FILES)
        if is_name and span not in NO_MODULES:
            assert looked_up(span) is not None, f"{page.name} names {span}"


def commands_of(program: str) -> list[object]:
    """Every command of a program on every page."""
    found = [(page.name, words) for page in PAGES for words in page.commands_of(program) if words]
    return [pytest.param(*each, id=f"{each[0]}: {' '.join(each[1])}") for each in found]


def shown_help(command: list[str]) -> str | None:
    """What ``--help`` prints; None if there is no such command."""
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    return shown.output if shown.exit_code == 0 else None


def has_flag(text: str, flag: str) -> bool:
    return re.search(rf"^ +{flag}\b", text, re.MULTILINE) is not None


@pytest.mark.parametrize(("page", "words"), commands_of("muxtune"))
def test_commands_and_their_flags_exist(page, words):
    subcommands = [word for word in words[:3] if re.fullmatch(r"[a-z]+", word)]
    texts = [shown_help(subcommands[:length]) for length in range(len(subcommands) + 1)]
    assert None not in texts[:2], f"{page}: there is no muxtune {' '.join(words)}"
    known = [text for text in texts if text is not None]  # what is no command any more is an argument
    for flag in re.findall(r"--[a-z][a-z-]*", " ".join(words)):
        assert any(has_flag(text, flag) for text in known), f"{page}: {' '.join(words)} has no {flag}"


def test_flags_alone_belong_to_a_command():
    names = ("plan", "simulate", "compare", "run", "validate", "sweep", "profile")
    helps = [shown_help([name]) or "" for name in names]
    fitting = "".join(file.read_text() for file in (ROOT / "profiler" / "fitting").glob("*.py"))
    flags = {(page.name, span.split()[0]) for page in PAGES for span in page.spans if span.startswith("--")}
    assert len(flags) > 20
    for page, flag in flags:
        known = any(has_flag(text, flag) for text in helps) or f'"{flag}"' in fitting
        assert known, f"{page}: {flag}"


@pytest.mark.parametrize(("page", "words"), commands_of("python"))
def test_scripts_know_their_flags(page, words):
    option, module, *rest = words
    assert option == "-m", words
    script = module.replace(".", "/")
    # The commands of a package are in its modules.
    files = (ROOT / script).glob("*.py") if (ROOT / script).is_dir() else [ROOT / f"{script}.py"]
    text = "".join(file.read_text() for file in files)
    for flag in (word for word in rest if word.startswith("--") and word != "--help"):
        assert f'add_argument("{flag}"' in text, f"{page}: {script} has no {flag}"


def test_make_targets_exist():
    targets = {words[0] for page in PAGES for words in page.commands_of("make")}
    assert {"demo", "test", "gpu-check"} <= targets
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name.startswith("docs/")], ids=lambda p: p.name
)
def test_a_page_can_be_read_in_a_quarter_of_an_hour(page):
    assert page.words <= MOST_WORDS


def glossary() -> list[tuple[str, str]]:
    """Words and the names that define them in code."""
    text = load_page("docs/design.md").text.partition("\n## Glossary\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| ([^|]+) \| [^|]+ \| `([\w.]+)` \|$", text, re.MULTILINE)


def test_the_glossary_has_a_word_once_and_every_row_names_code():
    text = load_page("docs/design.md").text.partition("\n## Glossary\n")[2].partition("\n## ")[0]
    rows = glossary()
    assert len(rows) == sum(line.startswith("| ") for line in text.splitlines()) - 1
    words = [word for entry, _ in rows for word in entry.split(", ")]
    assert len(words) == len(set(words)) > 40


@pytest.mark.parametrize(("word", "name"), glossary(), ids=lambda value: value)
def test_the_glossary_agrees_with_the_code(word, name):
    assert looked_up(name) is not None, f"{word}: there is no {name}"


FORMATS: tuple[tuple[type[BaseModel], str], ...] = (
    (Workload, "Workload"),
    (PeftTask, "Workload"),
    (LoraSpec, "Workload"),
    (DatasetSpec, "Workload"),
    (ClusterSpec, "Cluster"),
    (DeviceSpec, "Cluster"),
    (LinkSpec, "Cluster"),
    (Plan, "plan.json"),
    (Decisions, "plan.json"),
    (Derived, "plan.json"),
    (MicrobatchShape, "plan.json"),
    (HandDecisions, "plan.json"),
    (HandParallelism, "plan.json"),
    (HandHTask, "plan.json"),
    (ModelSpec, "plan.json"),
    (BackboneDigest, "plan.json"),
    (CostsRef, "plan.json"),
    (Parallelism, "plan.json"),
    (HTaskDecision, "plan.json"),
    (OrchestrationDecision, "plan.json"),
    (ClockLaunches, "plan.json"),
    (StageLaunches, "plan.json"),
    (Execution, "plan.json"),
    (Predicted, "plan.json"),
    (AlignmentReport, "plan.json"),
    (RunReport, "RUN_DIR"),
    (MeasuredMemory, "RUN_DIR"),
    (TokenTotals, "RUN_DIR"),
    (TaskStatus, "RUN_DIR"),
    (ValidationReport, "RUN_DIR"),
    (TaskValidation, "RUN_DIR"),
    (SweepSpec, "Sweeps"),
)
"""What users write and read, and the section of docs/files.md that has its keys; a plan has a page."""


@pytest.mark.parametrize(("model", "section"), FORMATS, ids=lambda value: getattr(value, "__name__", value))
def test_every_key_of_a_file_is_described(model, section):
    text = load_page("docs/plan.md").text
    if section != "plan.json":
        text = load_page("docs/files.md").text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    code = " ".join([*Page("section", text).spans, *re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)])
    keys = {field.alias or name for name, field in model.model_fields.items()}
    assert not keys - set(re.findall(r"\w+", code))


def looked_up(name: str) -> object | None:
    """What a dotted name means: a module, something in it, or a field of a class."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return _inside(found, parts[length:])
    return None


def _inside(found: object, names: list[str]) -> object | None:
    for name in names:
        if hasattr(found, name):
            found = getattr(found, name)
        elif name in _fields(found):
            return name
        else:
            return None
    return found if found is not None else names[-1]


def _fields(found: object) -> set[str]:
    if isinstance(found, ModuleType):
        return set()
    described = getattr(found, "model_fields", None)
    if described is not None:
        return set(described)
    return set(get_type_hints(found)) if is_dataclass(found) or isinstance(found, type) else set()


def test_a_missing_name_is_noticed():
    assert looked_up("muxtune.plan.Plan.buckets") is not None
    assert looked_up("muxtune.plan.Plan.phases") is None
    assert looked_up("muxtune.nowhere") is None
    page = Page("docs/x.md", "# One\n\nSee `muxtune/nowhere.py`, [two](#two) and `tests/sim/`.\n")
    assert page.paths == {"muxtune/nowhere.py", "tests/sim"}
    assert page.links == ["#two"]
    assert page.anchors == {"one"}
