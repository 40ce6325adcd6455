"""The journal of finished points."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sweep.journal import journal_path, open_journal
from muxtune.support.errors import UserError
from muxtune.support.files import OutputError


def test_what_was_appended_is_there_again(tmp_path):
    path = tmp_path / "new" / "r.journal"
    with open_journal(path) as journal:
        journal.append({"a": {"iteration_s": 0.1 + 0.2}})
        journal.append({"b": {"failure": "too\nlong"}, "c": {}})
    with open_journal(path) as journal:
        assert journal.finished == {"a": {"iteration_s": 0.1 + 0.2}, "b": {"failure": "too\nlong"}, "c": {}}


def test_half_a_last_line_does_not_count_and_is_overwritten(tmp_path):
    path = tmp_path / "r.journal"
    path.write_bytes(b'{"a": {}}\n{"b": {"iter')
    with open_journal(path) as journal:
        assert journal.finished == {"a": {}}
        journal.append({"c": {}})
    assert path.read_bytes() == b'{"a": {}}\n{"c": {}}\n'


def test_a_journal_has_one_writer(tmp_path):
    path = tmp_path / "r.journal"
    with (
        open_journal(path),
        pytest.raises(UserError, match="is being written by another sweep"),
        open_journal(path),
    ):
        pass


def test_an_empty_journal_leaves_nothing_behind(tmp_path):
    path = tmp_path / "r.journal"
    with open_journal(path):
        pass
    assert not path.exists()


def test_another_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "r.journal"
    path.write_text("notes\n")
    with pytest.raises(UserError, match=r"r\.journal:1 is no line of a sweep's journal"), open_journal(path):
        pass
    assert path.read_text() == "notes\n"


@pytest.mark.parametrize("notes", ["notes", '{"a": {}}\nnotes', "[1]\n", '{"a": 1}\n', "[" * 100_000 + "\n"])
def test_whatever_is_no_journal_is_refused_and_kept(tmp_path, notes):
    path = tmp_path / "r.journal"
    path.write_text(notes)
    with (
        pytest.raises(UserError, match=r"r\.journal.*a sweep's journal.*; remove the file"),
        open_journal(path),
    ):
        pass
    assert path.read_text() == notes


def test_who_is_refused_leaves_the_journal_of_the_one_who_writes(tmp_path):
    path = tmp_path / "r.journal"
    with open_journal(path) as first:
        for _ in range(2):
            with pytest.raises(UserError, match="is being written"), open_journal(path):
                pass
            assert path.exists()
        first.append({"a": {"status": "planned"}})
        with pytest.raises(UserError, match="is being written"), open_journal(path):
            pass
    with open_journal(path) as again:
        assert again.finished == {"a": {"status": "planned"}}


def test_a_removed_journal_stays_locked_for_nobody(tmp_path):
    path = tmp_path / "r.journal"
    with open_journal(path) as first:
        first.remove()
        with open_journal(path) as second:
            second.append({"b": {}})
            first.append({"a": {}})  # goes into the file without a name
            first.remove()
            assert path.exists()
    assert path.read_bytes() == b'{"b": {}}\n'


def test_a_journal_that_is_removed_while_another_waits_for_its_lock_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "r.journal"
    real_flock = fcntl.flock
    ended = []

    with open_journal(path) as first:

        def flock(descriptor, operation):
            if not ended:  # the second has opened the file; now the first ends
                first.remove()
                real_flock(first._descriptor, fcntl.LOCK_UN)
                ended.append(True)
            real_flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with open_journal(path) as second:
            second.append({"b": {}})
            assert path.read_bytes() == b'{"b": {}}\n'
    assert path.read_bytes() == b'{"b": {}}\n'


def test_an_empty_journal_of_another_is_not_removed(tmp_path):
    path = tmp_path / "r.journal"
    with open_journal(path):
        path.unlink()  # by a person
        path.touch()
    assert path.exists()


def test_many_processes_share_a_journal_one_after_the_other(tmp_path):
    path = tmp_path / "r.journal"
    program = f"""
import sys, time
from pathlib import Path
from experiments.sweep.journal import open_journal
from muxtune.support.errors import UserError
done = 0
while done < 25:
    try:
        with open_journal(Path({str(path)!r})) as journal:
            if done % 2:
                journal.append({{f"{{sys.argv[1]}}.{{done}}": {{}}}})
            done += 1
    except UserError:
        time.sleep(0.001)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i)]) for i in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    with open_journal(path) as journal:
        assert journal.finished.keys() == {f"{i}.{n}" for i in range(4) for n in range(1, 25, 2)}


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "r.journal"
    with open_journal(path) as journal:
        journal.append({"a": {}})
        real_write = os.write

        def write(descriptor, line):
            if len(line) < 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_write(descriptor, line[:-3])

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OutputError, match=r"cannot write .*r\.journal: No space left on device"):
            journal.append({"b": {}})
        monkeypatch.undo()
        assert journal.finished == {"a": {}}
        journal.append({"c": {}})
    assert path.read_bytes() == b'{"a": {}}\n{"c": {}}\n'


def test_what_is_no_file_is_no_journal(tmp_path):
    path = tmp_path / "r.journal"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no file"), open_journal(path):
        pass


def test_the_journal_lies_beside_the_file_that_a_link_leads_to(tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    assert journal_path(tmp_path / "link") == tmp_path / "elsewhere.journal"
    assert journal_path(tmp_path / "elsewhere") == tmp_path / "elsewhere.journal"
    assert journal_path(Path("/dev/null")) is None
    with open_journal(None) as journal:
        journal.append({"a": {}})
        assert journal.finished == {"a": {}}
        journal.remove()
