"""A process that ends early but loses nothing."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
from muxtune.processes import end_process
atexit.register(lambda: print("the interpreter's own finish"))
sys.stdout.write("out")
sys.stderr.write("err")
end_process()
"""


def test_what_was_printed_is_there_and_nothing_runs_after_it():
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "out", "err")
