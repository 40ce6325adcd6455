"""A process that ends early but loses nothing."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from muxtune.processes import end_process
atexit.register(lambda: print("the interpreter's own finish"))
sys.stdout.write("out")
sys.stderr.write("err")
end_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 75])
def test_what_was_printed_is_there_and_nothing_runs_after_it(code):
    command = [sys.executable, "-c", PROGRAM, str(code)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "out", "err")
