"""Files of users are read without hanging."""

import subprocess
import sys
from pathlib import Path

import pytest

from muxtune.support.errors import SpecError, UserError
from muxtune.support.user_files import check_regular, expand_user, is_folder, parse_json, read_user_bytes

READ_STDIN = """
import sys
from pathlib import Path
from muxtune.support.user_files import read_user_bytes
sys.stdout.write(read_user_bytes(Path(sys.argv[1]), "the plan").decode())
"""


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_a_pipe_that_somebody_writes_is_read(name):
    command = [sys.executable, "-c", READ_STDIN, name]
    assert (
        subprocess.run(command, input="content", capture_output=True, text=True, check=True).stdout
        == "content"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "b": {"steps": 1, "steps": 2}}', "p.json: the key 'steps' stands twice in one object"),
        (b"[" * 200_000, "p.json is nested too deeply"),
        (b'{"a":' * 100_000, "p.json is nested too deeply"),
        (b"9" * 5_000, "not a whole JSON file: an integer of thousands of digits"),
        (b"\xff", "not a whole JSON file: 'utf-8' codec"),
        (b'{"a": 1', "not a whole JSON file: Expecting"),
        (b"", "not a whole JSON file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_cannot_be_meant_is_refused(content, reason):
    with pytest.raises(UserError) as caught:
        parse_json(content, "p.json")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_same_key_may_stand_in_several_objects():
    assert parse_json(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}', "p") == {
        "a": {"a": 1},
        "b": [{"a": 1}, {"a": 2}],
    }


@pytest.mark.parametrize(
    ("path", "expected"), [("~no-such-user/x", "the home of a user"), ("a\0b", "without NUL")]
)
def test_a_path_that_cannot_be_is_refused_with_its_field(path, expected):
    with pytest.raises(SpecError, match=rf"tasks\.a\.dataset\.path = .*: expected .*{expected}"):
        expand_user(Path(path), "tasks.a.dataset.path")


def test_home_is_replaced(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_user(Path("~/x"), "f") == Path("/home/somebody/x")
    assert expand_user(Path("x/~"), "f") == Path("x/~")


def test_a_name_that_nothing_can_have_is_no_folder(tmp_path):
    assert is_folder(tmp_path)
    assert not any(is_folder(Path(name)) for name in ("n" * 5_000, "a\0b", tmp_path / "none"))


def test_only_regular_files_pass(tmp_path):
    (tmp_path / "x").write_bytes(b"12")
    check_regular(tmp_path / "x", "the profile")
    check_regular(tmp_path / "missing", "the profile")  # whoever opens it says so
    with pytest.raises(UserError, match="cannot read the profile /dev/zero: expected a regular file"):
        check_regular(Path("/dev/zero"), "the profile")
    assert read_user_bytes(tmp_path / "x", "the plan", most_mib=1) == b"12"
