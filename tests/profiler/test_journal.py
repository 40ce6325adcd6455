"""What a stopped session has measured is there for the next one, and for nobody else."""

import pytest

from muxtune.graph.operators import Operator
from muxtune.support.errors import UserError
from profiler.journal import journal_path, open_journal
from profiler.timing import Sample
from profiler.worker_protocol import Reading, write_line

READINGS = [
    Reading(Operator("norm", (tokens,)), "fwd", Sample(1e-3, 1e-3, 2e-3, tokens)) for tokens in (8, 16)
]


def keep(out, readings, conditions="here"):
    with open_journal(out, conditions) as journal:
        before = journal.lines
        for each in readings:
            journal.keep(write_line(each))
    return before


def test_lines_are_there_for_the_next_session(tmp_path):
    out = tmp_path / "p.parquet"
    assert keep(out, READINGS[:1]) == ()
    assert keep(out, READINGS[1:]) == (READINGS[0],)
    assert keep(out, []) == tuple(READINGS)


def test_half_a_line_is_dropped_and_the_rest_stays(tmp_path):
    out = tmp_path / "p.parquet"
    keep(out, READINGS)
    path = journal_path(out)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert keep(out, READINGS[1:]) == (READINGS[0],)
    assert path.read_bytes() == content


def test_other_conditions_begin_anew(tmp_path):
    out = tmp_path / "p.parquet"
    keep(out, READINGS)
    assert keep(out, [], conditions="elsewhere") == ()
    assert keep(out, []) == ()


@pytest.mark.parametrize("content", [b"", b"\n", b"no journal", b"{}\nnothing\n", b"\xff\xfe\n"])
def test_whatever_else_has_the_name_is_replaced(tmp_path, content):
    out = tmp_path / "p.parquet"
    journal_path(out).write_bytes(content)
    assert keep(out, READINGS) == ()
    assert keep(out, []) == tuple(READINGS)


def test_nothing_is_left_where_nothing_was_measured_and_where_all_is_written(tmp_path):
    out = tmp_path / "p.parquet"
    keep(out, [])
    assert list(tmp_path.iterdir()) == []
    keep(out, READINGS)
    with open_journal(out, "here") as journal:
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_two_sessions_do_not_share_it(tmp_path):
    out = tmp_path / "p.parquet"
    with open_journal(out, "here"), pytest.raises(UserError, match="another process is measuring into"):
        keep(out, [])
    keep(out, READINGS)


def test_without_a_file_nothing_is_kept():
    assert keep(None, READINGS) == ()
