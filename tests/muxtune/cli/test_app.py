from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muxtune.cli import catalog
from muxtune.support.errors import RunError


def test_help_loads_neither_torch_nor_simpy():
    script = (
        "import sys\n"
        "from muxtune.cli.app import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'simpy', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "profile", "plan", "simulate", "run", "validate", "compare"):
        assert f"\n  {command} " in done.stdout


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out.split()[0]) == (0, "muxtune")


@pytest.mark.parametrize(
    "command", "demo profile plan simulate run validate compare models clusters policies".split()
)
def test_every_command_has_help_and_json(cli, command):
    result = cli(command, "--help")
    assert result.code == 0
    assert "--json" in result.out


@pytest.mark.parametrize("arguments", [["plan"], ["nonsense"], ["plan", "--pp", "two"]])
def test_wrong_usage_ends_with_2(cli, arguments):
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")


def test_a_failure_of_ours_ends_with_1_and_one_line(cli, monkeypatch):
    def fail():
        raise KeyError("surprise")

    monkeypatch.setattr(catalog, "cluster_names", fail)
    result = cli("clusters")
    assert result.code == 1
    assert result.err == "muxtune: error: KeyError: 'surprise' (MUXTUNE_DEBUG=1 shows where)\n"


def test_a_failed_run_ends_with_1_and_its_own_words(cli, monkeypatch):
    def fail():
        raise RunError("rank 1 died:\n  out of memory")

    monkeypatch.setattr(catalog, "cluster_names", fail)
    result = cli("clusters")
    assert (result.code, result.err) == (1, "muxtune: error: rank 1 died: out of memory\n")


def test_debugging_shows_the_traceback(cli, monkeypatch):
    def fail():
        raise KeyError("surprise")

    monkeypatch.setattr(catalog, "cluster_names", fail)
    monkeypatch.setenv("MUXTUNE_DEBUG", "1")
    with pytest.raises(KeyError):
        cli("clusters")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_command_with_one_line(cli, monkeypatch, number, code):
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    monkeypatch.setattr(catalog, "cluster_names", lambda: signal.raise_signal(number))
    result = cli("clusters")
    signal.signal(signal.SIGINT, former)
    said = f"muxtune: stopped by {number.name}: nothing was written\n"
    assert (result.code, result.out, result.err) == (code, "", said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("arguments", ["clusters", "clusters --json", "--version", "plan --schema"])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_behind_stdout_is_one_line(arguments, unbuffered):
    command = [sys.executable, "-c", "from muxtune.cli.app import main; main()", *arguments.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert (done.returncode, done.stderr) == (
        2,
        "muxtune: error: cannot write stdout: No space left on device\n",
    )


def test_a_reader_that_goes_away_is_no_failure_to_tell_of():
    command = [sys.executable, "-c", "from muxtune.cli.app import main; main()", "plan", "--schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
