"""JSONL files: lines by their places, against a reader of the whole file, and what is no such file."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.support.errors import SpecError, UserError
from muxtune.tasks import jsonl
from muxtune.tasks.jsonl import JsonlFile, open_jsonl

LINES = st.lists(
    st.sampled_from([b"", b" ", b"\t \r", b'{"text": "a"}', b' {"text": "bb"}', b'{"text": "c"}\r', b"\x0b"])
)


def old_file(path, content, *, age_s=60):
    """A file that nobody has changed for a while."""
    path.write_bytes(content)
    stamp = path.stat().st_mtime - age_s
    os.utime(path, (stamp, stamp))
    return path


def texts(file, *positions):
    chosen = np.array(positions) if positions else np.arange(len(file))
    return [text.completion for text in file.texts(chosen)]


@given(LINES, st.booleans(), st.integers(1, 40))
def test_lines_are_those_of_the_whole_file_wherever_blocks_end(tmp_path_factory, lines, mark, block_bytes):
    content = (b"\xef\xbb\xbf" if mark else b"") + b"\n".join(lines)
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    path.write_bytes(content)
    expected = [json.loads(line)["text"] for line in lines if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_BLOCK_BYTES", block_bytes)
        if not expected:
            with pytest.raises(SpecError, match="at least one example"):
                JsonlFile(path, "field")
            return
        file = JsonlFile(path, "field")
    assert texts(file) == expected
    assert texts(file, len(file) - 1, 0) == [expected[-1], expected[0]]
    assert file.digest == hashlib.sha256(content).hexdigest()


def test_a_line_that_nobody_asks_for_is_not_parsed_and_one_that_is_asked_for_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n\nnonsense\n{"text": "b"}\n')
    file = JsonlFile(path, "field")
    assert texts(file, 0, 2) == ["a", "b"]
    with pytest.raises(UserError, match=r"d\.jsonl:3: not JSON"):
        texts(file, 1)


def test_a_file_is_read_again_only_if_it_has_changed(tmp_path, monkeypatch):
    path = old_file(tmp_path / "d.jsonl", b'{"text": "a"}\n')
    monkeypatch.setattr(jsonl, "_SETTLED_S", -1.0)  # a change of now is told by its time stamp here
    first = open_jsonl(path, "field")
    assert open_jsonl(path, "field") is first
    old_file(path, b'{"text": "b"}\n', age_s=50)
    second = open_jsonl(path, "field")
    assert texts(second) == ["b"]
    with pytest.raises(UserError, match="changed while it was read"):
        texts(first)


def test_a_file_that_has_just_changed_is_read_every_time(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    monkeypatch.setattr(jsonl, "_SETTLED_S", 3600.0)
    assert open_jsonl(path, "field") is not open_jsonl(path, "field")


@pytest.mark.timeout(30)
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(SpecError, match=r"field = .*pipe': expected a readable JSONL file \(Is a pipe or a"):
        open_jsonl(pipe, "field")
    with pytest.raises(SpecError, match=r"\(Is a pipe or a device\)"):
        open_jsonl(type(tmp_path)("/dev/zero"), "field")
    with pytest.raises(SpecError, match=r"\(Is a directory; name the file in it\)"):
        open_jsonl(tmp_path, "field")
    with pytest.raises(SpecError, match="the path of a JSONL file"):
        open_jsonl(tmp_path / "a\0b", "field")


def test_a_file_that_vanishes_is_said_to_have_changed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    file = JsonlFile(path, "field")
    path.unlink()
    with pytest.raises(UserError, match="changed while it was read"):
        texts(file)
