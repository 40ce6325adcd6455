"""A process that ends early but loses nothing, and one that ends with its parent."""

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


BUSY = """
from muxtune.processes import end_with_parent
end_with_parent()
print("busy", flush=True)
while True:
    pass
"""


def test_whatever_a_process_does_it_ends_when_nobody_holds_its_stdin():
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "busy\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1
