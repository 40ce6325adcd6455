"""A run's folder belongs to one run at a time, and what killed runs have left goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from muxtune.support import run_folder
from muxtune.support.errors import RunError, UserError
from muxtune.support.files import write_atomically
from muxtune.support.run_folder import (
    FolderWatch,
    locked,
    meeting_folder,
    refuse_if_locked,
    remove_temporaries,
)


def test_a_folder_in_use_is_refused_until_its_owner_has_ended(tmp_path):
    with locked(tmp_path):
        with pytest.raises(
            UserError, match=rf"is in use by another run \(process {os.getpid()} on "
        ) as caught:
            refuse_if_locked(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="is in use by another run"), locked(tmp_path):
            pass
    refuse_if_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_lasts_as_long_as_the_ranks_that_have_its_descriptor(tmp_path):
    code = (
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        "from muxtune.support.run_folder import locked\n"
        "with locked(Path(sys.argv[1])) as lock:\n"
        "    rank = subprocess.Popen(['sleep', '60'], pass_fds=(lock,), stdout=subprocess.DEVNULL)\n"
        "    print(rank.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    rank = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        with pytest.raises(UserError, match="in use"):
            refuse_if_locked(tmp_path)
    finally:
        os.kill(rank, 9)
        parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            refuse_if_locked(tmp_path)
        except UserError:
            time.sleep(0.01)
        else:
            return
    pytest.fail("the lock outlived both")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_gone_or_replaced_is_noticed(tmp_path, replaced):
    folder = tmp_path / "run"
    folder.mkdir()
    watch = FolderWatch(folder)
    watch.check()
    folder.rename(tmp_path / "elsewhere")
    if replaced:
        folder.mkdir()
    with pytest.raises(RunError, match="run is gone"):
        watch.check()


def test_half_written_files_go_and_nothing_else(tmp_path):
    names = [
        "plan.json",
        "backbone.json",
        "tasks/a/losses.csv",
        "plans/from-000010.json",
        "tasks/a/checkpoints/step-000010/part-12-of-16.safetensors",
    ]
    left = []
    for name in names:

        def die(temporary):
            left.append(temporary.name)
            temporary.rename(temporary.with_name("kept"))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / name, die)
        folder = (tmp_path / name).parent
        (folder / "kept").rename(folder / left[-1])
    users = [tmp_path / ".notes.txt.abcdefgh", tmp_path / ".plan.json.backup-of-mine", tmp_path / "plan.json"]
    for path in users:
        path.write_text("mine")
    remove_temporaries(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(users)


def test_meeting_folders_of_dead_runs_go_and_those_of_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, old, young = (tmp_path / f"muxtune-run-{name}" for name in ("dead", "old", "young"))
    for path in (dead, old, young):
        path.mkdir()
    (dead / "owner").write_text("")
    (dead / "store").write_text("")
    os.utime(old, (0, 0))
    with meeting_folder() as living, meeting_folder() as second:
        assert all(path.is_dir() for path in (living, second, young))
        assert not any(path.exists() for path in (dead, old))
    assert [path.name for path in tmp_path.iterdir()] == ["muxtune-run-young"]
