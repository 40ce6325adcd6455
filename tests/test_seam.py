"""The PEFT seam: no code outside of a method's own modules knows the method."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("muxtune", "profiler", "sim", "runtime")

_LORA = re.compile(r"(?<![a-z])lora(?!pp|fusion)", re.IGNORECASE)
"""The method; not the names of other systems and of a schedule."""

_OWN = (
    "muxtune/peft/lora*.py",
    "muxtune/peft/__init__.py",
    "muxtune/costs/adapters.py",  # its grouped kernels' prices
    "runtime/peft/lora*.py",
    "runtime/peft/__init__.py",
    "runtime/ops/kernels/*.py",
)
"""Modules that may know it."""


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers, imports and strings of a module, without docstrings and comments."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, " ".join([node.module or "", *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("room", ROOMS)
def test_only_its_own_modules_know_a_method(room):
    own = {path for pattern in _OWN for path in ROOT.glob(pattern)}
    knowing = [
        f"{path.relative_to(ROOT)}:{line}: {word[:60]}"
        for path in sorted((ROOT / room).rglob("*.py"))
        if path not in own
        for line, word in words(path)
        if _LORA.search(word)
    ]
    assert not knowing


@pytest.mark.parametrize("method", ["ia3", "bitfit", "shira"])
def test_only_two_modules_know_a_small_method(method):
    own = {ROOT / room / "peft" / name for room in ROOMS for name in (f"{method}.py", "__init__.py")}
    knowing = [
        f"{path.relative_to(ROOT)}:{line}: {word[:60]}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if path not in own
        for line, word in words(path)
        if method in word.lower()
    ]
    assert not knowing


def test_the_search_finds_what_it_looks_for():
    found = [word for _, word in words(ROOT / "muxtune/peft/lora.py") if _LORA.search(word)]
    assert {"LoraSpec", "lora", "lora_A.weight"} <= set(found)
