"""Files are whole or absent, whatever happens while they are written."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from muxtune.support.files import (
    OutputError,
    descriptor_moved,
    file_name,
    write_atomically,
    write_text_atomically,
)


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


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text_atomically(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(mode)
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    os.chown(path, 4321, 8765)
    write_text_atomically(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (4321, 8765)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(OutputError, match=r"cannot write .*x: Permission denied"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed_and_stay(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if exists:
        target.write_text("old")
    (tmp_path / "middle").symlink_to("elsewhere/target")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "middle")
    places = []
    write_atomically(link, lambda temporary: places.append(temporary.parent) or temporary.write_text("new"))
    assert link.is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert places == [target.parent]  # replaced in one step, where the file is
    assert os.listdir(target.parent) == ["target"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputError, match=r"cannot write .*/a: Too many levels of symbolic links"):
        write_text_atomically(tmp_path / "a", "")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_fifo_is_written_through_and_stays(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_text_atomically(link, "through\n" * 50_000)
    reader.join()
    assert read == ["through\n" * 50_000]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


def test_a_device_is_written_through_and_stays(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices, and not in every container")
    before = path.stat()
    write_text_atomically(path, "gone")
    assert path.stat().st_rdev == before.st_rdev
    assert path.stat().st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["null"]


def test_a_full_device_is_named():
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left on device"):
        write_text_atomically(Path("/dev/full"), "x")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


STDOUT_TWICE = """
from pathlib import Path
from muxtune.support.files import write_text_atomically
print("before")
write_text_atomically(Path("{name}"), "content\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_stdout_gets_the_content_in_its_place(tmp_path, name, kind):
    command = [sys.executable, "-c", STDOUT_TWICE.format(name=name)]
    if kind == "pipe":
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        with (tmp_path / "out").open("w") as out:
            out.write("head\n")
            out.flush()
            subprocess.run(command, stdout=out, check=True)
        head, text = (tmp_path / "out").read_text().split("\n", 1)
        assert head == "head"
        assert os.listdir(tmp_path) == ["out"]
    assert text == "before\ncontent\nafter\n"


def test_stdout_that_is_lent_to_something_else_is_still_found(tmp_path):
    path = tmp_path / "out"
    with path.open("wb") as out, descriptor_moved(1, out.fileno()):
        write_text_atomically(Path("/dev/stdout"), "content")
    assert path.read_text() == "content"


def test_a_long_name_is_possible(tmp_path):
    path = tmp_path / ("n" * 255)
    write_text_atomically(path, "x")
    assert path.read_text() == "x"


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / ("n" * 256), tmp_path, tmp_path / "a\0b"):
        with pytest.raises(OutputError, match=f"cannot write {tmp_path}"):
            write_text_atomically(path, "x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama-tiny", "llama-tiny"),
        ("../../x", "-..-x"),
        ("", "unnamed"),
        ("a\0b\n", "a-b-"),
        ("n" * 300, "n" * 64),
    ],
)
def test_a_name_of_a_user_becomes_part_of_a_file_name(text, name):
    assert file_name(text) == name
