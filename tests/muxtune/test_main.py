"""``python -m muxtune`` is the command line."""

from __future__ import annotations

import subprocess
import sys


def test_python_m_muxtune_is_the_command_line():
    command = [sys.executable, "-m", "muxtune", "models", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert '"llama-tiny"' in finished.stdout


def test_a_mistake_ends_with_its_exit_code():
    command = [sys.executable, "-m", "muxtune", "simulate", "no-such-plan.json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("muxtune: error: ")
    assert finished.stderr.count("\n") == 1
