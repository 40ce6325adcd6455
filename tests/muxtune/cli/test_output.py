from __future__ import annotations

import os
from pathlib import Path

import pytest

from muxtune.cli.output import check_writable
from muxtune.support.errors import SpecError


def test_output_paths_are_checked_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "new" / "deep" / "x.json", "--out")
    check_writable(file, "--out")
    check_writable(None, "--out")
    check_writable(tmp_path, "--out", folder=True)
    with pytest.raises(SpecError, match=r"--out = .*: expected a file, not a folder"):
        check_writable(tmp_path, "--out")
    with pytest.raises(SpecError, match="expected a folder"):
        check_writable(file, "--out", folder=True)
    with pytest.raises(SpecError, match="file is a file"):
        check_writable(file / "x.json", "--out")


def test_an_output_path_may_be_a_link_a_fifo_or_stdout(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "new").symlink_to(tmp_path / "target")
    for path in (tmp_path / "fifo", tmp_path / "new", Path("/dev/null"), Path("/dev/stdout")):
        check_writable(path, "--out")


def test_an_output_path_must_lead_somewhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SpecError, match=r"--out = '.*loop': .* \(Too many levels of symbolic links\)"):
        check_writable(tmp_path / "loop", "--out")
    (tmp_path / "file").touch()
    (tmp_path / "into").symlink_to(tmp_path / "file" / "x")
    with pytest.raises(SpecError, match="--out"):
        check_writable(tmp_path / "into", "--out")
    with pytest.raises(SpecError, match="--out"):
        check_writable(tmp_path / ("n" * 256), "--out")


def test_an_input_is_never_an_output(tmp_path):
    workload, link = tmp_path / "w.yaml", tmp_path / "link"
    workload.write_text("tasks: []")
    link.symlink_to(workload)
    for out in (workload, link, tmp_path / "." / "w.yaml"):
        with pytest.raises(SpecError, match=r"^--out = '.*': expected another file than .*w\.yaml, which is"):
            check_writable(out, "--out", inputs=[None, "testbed-a", workload])
    check_writable(tmp_path / "new.json", "--out", inputs=[workload])
    check_writable(workload, "--out", inputs=["n" * 300, "a\0b", tmp_path / "gone"])
    check_writable(Path("/dev/stdout"), "--out", inputs=["/dev/stdin", workload])
