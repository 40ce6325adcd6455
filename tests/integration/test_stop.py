"""Commands that start ranks or measuring processes end alike when they are told to stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from muxtune.costs import save_profile
from runtime.tasks.checkpoint_files import complete_steps
from tests.helpers import write_examples
from tests.integration.processes import wait_until
from tests.muxtune.cli.conftest import SUMS, task
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators
from tests.sampling import in_full

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]

_MAIN = (
    # A shell's background jobs, and what they start, inherit that SIGINT is ignored.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from muxtune.cli.app import main; main()"
)


def _stopped(words: Sequence[str], folder: Path, is_time: Callable[[], bool], number: signal.Signals) -> str:
    """Run a command, stop it when it is time, and return what it said; no process of it is left."""
    environment = os.environ | {"TMPDIR": str(folder), "MUXTUNE_CACHE": str(folder / "cache")}
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *words], stdout=subprocess.PIPE, stderr=errors, env=environment
        )

    def has_begun() -> bool:
        assert process.poll() is None, (folder / "stderr").read_text()
        return is_time()

    try:
        wait_until(has_begun, 150)
        assert len(_processes_of(folder)) > 1
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert out == b""
    wait_until(lambda: not _processes_of(folder), 10)
    text = (folder / "stderr").read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("muxtune: stopped")]
    return line


def _processes_of(folder: Path) -> list[int]:
    """Living processes that were told of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, status = (path / "environ").read_bytes(), (path / "stat").read_text()
        except OSError:  # it has just ended, or is somebody else's
            continue
        if f"TMPDIR={folder}".encode() in words and status.rsplit(")", 1)[1].split()[0] != "Z":
            found.append(int(path.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, *in_full(signal.SIGINT)])
def test_a_comparison_says_which_runs_are_kept(number, tmp_path):
    examples = {"path": str(write_examples(tmp_path / "a.jsonl", seed=0))}
    tasks = [task(name, dataset=examples, steps=50_000) for name in "ab"]
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({"backbone": "llama-tiny", "tasks": tasks}))
    save_profile(make_profile(analytic_law(), [*operators(), *SUMS]), tmp_path / "p.parquet")
    words = f"compare --workload {tmp_path}/w.yaml --cluster cpu-2 --profile {tmp_path}/p.parquet "
    words += f"--policies nemo,muxtune --measure --out {tmp_path}/runs"
    checkpoints = tmp_path / "runs" / "nemo" / "tasks" / "a" / "checkpoints"
    line = _stopped(words.split(), tmp_path, lambda: bool(complete_steps(checkpoints)), number)
    kept = f"the finished runs (of no policy yet) are kept in {tmp_path}/runs"
    assert line == f"muxtune: stopped by {number.name}: {kept}; a new comparison needs another folder"


def test_a_demonstration_says_what_is_finished(tmp_path):
    out = tmp_path / "demo"

    def measures() -> bool:
        return len(_processes_of(tmp_path)) >= 3  # the command, and two that measure

    line = _stopped(["demo", "--out", str(out)], tmp_path, measures, signal.SIGTERM)
    kept = rf"what is finished \(texts\) is kept in {re.escape(str(out))}; the same command begins anew"
    assert re.fullmatch(rf"muxtune: stopped by SIGTERM: {kept}", line)
    assert (out / "workload.yaml").exists()
