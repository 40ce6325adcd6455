"""What a person is told to type starts this program."""

import subprocess
import sys

import pytest

from muxtune.support.invocation import program_name


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An environment below the current directory that is on no path."""
    program = tmp_path / ".venv" / "bin" / "muxtune"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "argv", [str(program)])
    return program


def test_a_program_that_no_shell_finds_has_its_path(installed):
    assert program_name() == ".venv/bin/muxtune"


def test_one_on_the_path_has_its_name(installed, monkeypatch):
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program_name() == "muxtune"


def test_another_one_on_the_path_is_not_meant(installed, tmp_path, monkeypatch):
    other = tmp_path / "other" / "muxtune"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert program_name() == ".venv/bin/muxtune"


def test_from_elsewhere_the_path_is_whole(installed, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program_name() == str(installed)


@pytest.mark.parametrize("beside", [True, False])
def test_a_module_is_started_by_what_its_interpreter_has(installed, monkeypatch, beside):
    monkeypatch.setattr(sys, "argv", ["/somewhere/muxtune/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(installed.with_name("python")))
    if not beside:
        installed.unlink()
    assert program_name() == (".venv/bin/muxtune" if beside else ".venv/bin/python -m muxtune")


def test_what_it_says_runs():
    words = program_name().split()
    assert subprocess.run([*words, "--version"], capture_output=True, check=True).stdout.startswith(
        b"muxtune "
    )
