"""The three ways to start a run end alike: with the same bits, or with one cause and no process left.

By default every end and every way, and each end in the ways that differ most; all pairs in a full run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from muxtune.model import load_model_spec
from muxtune.plan import save_plan
from muxtune.tasks import Workload
from runtime import PEER_LOST_EXIT_CODE
from runtime.tasks.checkpoint_files import complete_steps
from tests.helpers import make_boundless_model, make_plan, make_task, write_examples
from tests.integration.launchers import END_LIMIT_S, ONE_NODE, SPAWNER, TWO_NODES, Launch, launched
from tests.integration.processes import wait_until
from tests.sampling import in_full

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc"),
]

START_LIMIT_S = 150.0
"""Importing torch on a busy machine takes a while."""


def _plan(folder: Path, hf_dirs: dict[str, Path], **changes: object) -> Path:
    """Two stages, and far more steps than a test waits for unless it says so."""
    tasks = tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=i), **({"steps": 50_000} | changes))
        for i, name in enumerate("ab")
    )
    model = load_model_spec(str(hf_dirs["llama"]))
    plan = make_plan(Workload(tasks=tasks), model, partition=[["a"], ["b"]], template="continuous")
    save_plan(plan, folder / "plan.json")
    return folder / "plan.json"


def _wait_until_it_trains(launch: Launch) -> None:
    checkpoints = [launch.run_dir / "tasks" / task_id / "checkpoints" for task_id in "ab"]

    def trains() -> bool:
        assert any(launcher.poll() is None for launcher in launch.launchers), launch.printed()
        return all(map(complete_steps, checkpoints))

    wait_until(trains, START_LIMIT_S)


def _seconds_until_all_ended(launch: Launch, begin_s: float) -> float:
    wait_until(lambda: not any(_lives(pid) for pid in launch.all_pids()), 60)
    return time.monotonic() - begin_s


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _complaints(launch: Launch) -> list[str]:
    return [line for text in launch.printed() for line in text.splitlines() if "muxtune: error" in line]


def _root_causes(launch: Launch) -> list[tuple[int, int]]:
    """Rank and exit code that each torchrun names as the first failure; it also lists those that it ended."""
    ends = [text.partition("Root Cause")[2] for text in launch.printed()]
    entries = [re.search(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", end) for end in ends]
    return [(int(entry[1]), int(entry[2])) for entry in entries if entry]


def test_two_nodes_give_the_bits_of_the_spawned_run_and_one_report(tmp_path, hf_dirs):
    plan = _plan(tmp_path, hf_dirs, steps=4)
    with launched(SPAWNER, plan, tmp_path / "spawned", "--json") as spawned:
        assert spawned.wait(START_LIMIT_S) == [0]
    with launched(TWO_NODES, plan, tmp_path / "joined", "--json") as joined:
        assert joined.wait(START_LIMIT_S) == [0, 0], joined.printed()
        assert joined.all_pids() == []
    first, second = joined.printed("stdout")
    assert json.loads(first) == json.loads((tmp_path / "joined" / "run.json").read_text())
    assert second == ""
    for task_id in "ab":
        ours, theirs = (
            load_file(tmp_path / run / "tasks" / task_id / "adapter" / "adapter_model.safetensors")
            for run in ("spawned", "joined")
        )
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.parametrize("kind", [SPAWNER, TWO_NODES, *in_full(ONE_NODE)])
def test_a_rank_that_raises_is_reported_once_and_all_end(kind, tmp_path, hf_dirs, record_property):
    plan = _plan(tmp_path, {"llama": make_boundless_model(tmp_path / "model", hf_dirs["llama"])})
    with launched(kind, plan, tmp_path / "run", "--strict") as launch:
        states = tmp_path / "run" / "tasks"

        def has_failed() -> bool:
            return any('"failed"' in path.read_text() for path in states.glob("*/status.json"))

        wait_until(has_failed, START_LIMIT_S)
        took_s = _seconds_until_all_ended(launch, time.monotonic())
        codes = launch.wait(1)
    record_property("seconds to the end", took_s)
    assert took_s < END_LIMIT_S
    assert all(codes)
    (complaint,) = _complaints(launch)
    assert complaint.startswith("muxtune: error: rank 1: task ")
    assert "the loss is" in complaint


@pytest.mark.parametrize("kind", [SPAWNER, TWO_NODES, *in_full(ONE_NODE)])
def test_a_rank_killed_with_9_is_reported_once_and_all_end(kind, tmp_path, hf_dirs, record_property):
    with launched(kind, _plan(tmp_path, hf_dirs), tmp_path / "run") as launch:
        _wait_until_it_trains(launch)
        begin_s = time.monotonic()
        os.kill(launch.pids()[1], signal.SIGKILL)
        took_s = _seconds_until_all_ended(launch, begin_s)
        codes = launch.wait(1)
    record_property("seconds to the end", took_s)
    assert took_s < END_LIMIT_S
    assert all(codes)
    if kind == SPAWNER:
        (complaint,) = _complaints(launch)
        assert complaint.startswith("muxtune: error: rank 1: killed by SIGKILL")
        return
    assert _complaints(launch) == []  # torchrun says it
    killed = (1, -signal.SIGKILL)
    # The other node's torchrun can only say that its own rank had to stop.
    expected = [killed] if kind == ONE_NODE else [(0, PEER_LOST_EXIT_CODE), killed]
    assert _root_causes(launch) == expected
    assert "".join(launch.printed()).count("rank 0 ended: ") == (kind == TWO_NODES)


@pytest.mark.parametrize("kind", [SPAWNER, ONE_NODE])
def test_a_rank_that_hangs_is_given_up_reported_once_and_killed(kind, tmp_path, hf_dirs, record_property):
    timeout_s = 15.0  # ranks that start on a busy machine are seconds apart
    options = ("--peer-timeout", str(timeout_s))
    with launched(kind, _plan(tmp_path, hf_dirs), tmp_path / "run", *options) as launch:
        _wait_until_it_trains(launch)
        begin_s = time.monotonic()
        hanging = launch.pids()[1]
        os.kill(hanging, signal.SIGSTOP)  # not even SIGTERM ends it, which is why the spawner uses SIGKILL
        if kind == ONE_NODE:  # torchrun would wait 30 s before it does; most hanging ranks can be terminated
            wait_until(lambda: 0 not in launch.pids(), 30)
            os.kill(hanging, signal.SIGCONT)
        took_s = _seconds_until_all_ended(launch, begin_s)
        codes = launch.wait(1)
    record_property("seconds to the end", took_s)
    assert timeout_s - 1 < took_s < timeout_s + END_LIMIT_S
    assert all(codes)
    text = "".join(launch.printed())
    assert text.count("rank 1 did not answer") == 1
    if kind == SPAWNER:
        (complaint,) = _complaints(launch)
        assert complaint.startswith("muxtune: error: rank 1: hangs, and was killed; rank 0: rank 1 did not")
    else:  # the rank that waited is the first to end, and says why
        assert _complaints(launch) == []
        assert _root_causes(launch) == [(0, PEER_LOST_EXIT_CODE)]


@pytest.mark.parametrize("kind", [TWO_NODES, *in_full(ONE_NODE)])
def test_what_all_ranks_refuse_is_said_by_the_first_alone(kind, tmp_path, hf_dirs):
    plan = _plan(tmp_path, hf_dirs)
    write_examples(tmp_path / "b.jsonl", seed=9)
    with launched(kind, plan, tmp_path / "run") as launch:
        assert all(launch.wait(START_LIMIT_S))
        assert launch.all_pids() == []
    (complaint,) = _complaints(launch)
    assert "rank 0: " in complaint
    assert "tasks.b.dataset.path" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        (SPAWNER, signal.SIGTERM, 143),
        (SPAWNER, signal.SIGINT, 130),
        (ONE_NODE, signal.SIGTERM, 143),
        *in_full((ONE_NODE, signal.SIGINT, 130)),
    ],
)
def test_a_run_that_is_told_to_stop_says_what_is_kept_and_goes_on(
    kind, number, code, tmp_path, hf_dirs, command
):
    plan = _plan(tmp_path, hf_dirs)
    with launched(kind, plan, tmp_path / "run") as launch:
        _wait_until_it_trains(launch)
        begin_s = time.monotonic()
        launch.launchers[0].send_signal(number)
        took_s = _seconds_until_all_ended(launch, begin_s)
        codes = launch.wait(30)
    assert took_s < END_LIMIT_S
    (text,) = launch.printed()
    told = f"muxtune: stopped by {number.name if kind == SPAWNER else 'SIG'}"
    (line,) = [line for line in text.splitlines() if told in line]
    assert re.search(
        r"the checkpoint of step \d+0 of 50000 is kept in .*run; the same command with --resume goes on$",
        line,
    )
    if kind == SPAWNER:
        assert codes == [code]
        assert "Traceback" not in text
        kept = int(re.search(r"step (\d+) of", line)[1])
        again = command("run", plan, "--out", tmp_path / "run", "--resume", "--steps", kept + 1, "--json")
        assert again.code == 0, again.err
        assert again.json["first_step"] == kept


def test_a_second_run_in_the_folder_of_a_living_one_is_refused_with_one_line(tmp_path, hf_dirs, command):
    plan = _plan(tmp_path, hf_dirs)
    with launched(SPAWNER, plan, tmp_path / "run") as first:
        _wait_until_it_trains(first)
        for options in ((), ("--resume",)):
            second = command("run", plan, "--out", tmp_path / "run", *options)
            (line,) = second.err.splitlines()
            assert second.code == 2
            assert re.search(r"run is in use by another run \(process \d+ on .*\); wait for its end$", line)
        assert first.launchers[0].poll() is None
