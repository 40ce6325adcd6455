"""Processes that end early but lose nothing, end with their parent, or are told to stop."""

import signal
import subprocess
import sys
import time

import pytest

from muxtune.support.processes import Stopped, keeping, stoppable

PROGRAM = """
import atexit, sys
from muxtune.support.processes import end_process
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
from muxtune.support.processes import end_with_parent
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


_CODE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
from muxtune.support.processes import Stopped, end_when_stopped, keeping, stoppable
try:
    with {guard}:
        {wait}
except Stopped as stopped:
    print(stopped, flush=True)
    {then}
    sys.exit(stopped.exit_code)
"""
_BEGUN = "print('begun', flush=True); "
_IN_C = _BEGUN + "import _thread; lock = _thread.allocate_lock(); lock.acquire(); lock.acquire()"
"""A wait from which no handler of Python's own brings the main thread back."""


def _started(guard: str, wait: str = _BEGUN + "time.sleep(60)", then: str = "pass") -> subprocess.Popen:
    code = _CODE.format(guard=guard, wait=wait, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_raises_and_the_command_may_say_what_is_kept(number, code):
    process = _started("stoppable()")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, f"stopped by {number.name}\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_a_command_that_still_cleans_up(number, code):
    process = _started("stoppable()", wait="""
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("cleans up", flush=True)
            time.sleep(60)""")  # fmt: skip
    process.send_signal(number)
    assert process.stdout.readline() == "cleans up\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(("rank", "said"), [(0, "muxtune: stopped by SIGTERM: step 4 is kept\n"), (1, "")])
def test_a_rank_that_waits_in_a_library_ends_too_and_one_says_what_is_kept(rank, said):
    process = _started(f"end_when_stopped(lambda: 'step 4 is kept', {rank})", wait=_IN_C)
    time.sleep(0.1)  # until it waits
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "", said)


def test_what_a_part_of_the_work_would_say_is_replaced_by_what_the_whole_says():
    whole, part = keeping(lambda: "half of it is kept"), keeping(lambda: "this part is kept")
    with pytest.raises(Stopped) as stopped, stoppable(), whole, part:
        signal.raise_signal(signal.SIGTERM)
    assert str(stopped.value) == "stopped by SIGTERM: half of it is kept"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
