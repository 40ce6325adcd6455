"""Files are whole or absent, whatever happens while they are written."""

import os
import stat

import pytest

from muxtune.files import write_atomically, write_text_atomically


def test_text_is_written_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "plan.json"
    write_text_atomically(path, "ümläut\n")
    assert path.read_text() == "ümläut\n"
    assert os.listdir(path.parent) == ["plan.json"]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text("old, and longer")
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    "failure", [OSError("disk full"), KeyboardInterrupt()], ids=lambda f: type(f).__name__
)
def test_a_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path, existed, failure):
    path = tmp_path / "x"
    if existed:
        path.write_text("old")

    def write_half(temporary):
        temporary.write_text("ne")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, write_half)
    assert os.listdir(tmp_path) == (["x"] if existed else [])
    if existed:
        assert path.read_text() == "old"


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    seen = []

    def write(temporary):
        temporary.write_text("ne")
        seen.append(path.read_text())
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old", "old"]
    assert path.read_text() == "new"


def test_the_temporary_lies_beside_the_file_so_that_the_move_is_one_step(tmp_path):
    places = []
    write_atomically(tmp_path / "x", lambda temporary: places.append(temporary) or temporary.write_text(""))
    assert places[0].parent == tmp_path
    assert places[0].name.startswith(".x.")


def test_others_may_read_the_file(tmp_path):
    write_text_atomically(tmp_path / "x", "")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644
