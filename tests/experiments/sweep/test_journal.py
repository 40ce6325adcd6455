"""The journal of finished points."""

from __future__ import annotations

import pytest

from experiments.sweep.journal import open_journal
from muxtune.errors import UserError


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
