"""Is anything lost when processes of a run are killed at random moments, again and again?

    python -m benchmarks.kill_resume [--kills 30] [--seed 0]

Three small tasks with dropout and shuffling train on llama-tiny, two stages, continuous. One run is left
alone. Another one is killed (SIGKILL) and resumed: a random rank, the parent, or all of them, while it starts
or some checkpoints later. After each kill nothing may keep running; after the last one the run is let go to
its end. Its adapters have to be those of the undisturbed run, bit for bit, and its losses, digit for digit.

Exit code 1 if they are not, or if a process outlives the others by more than 10 s.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.helpers.machine import machine_line
from muxtune.cluster import load_cluster
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.model import load_model_spec
from muxtune.plan import Plan, save_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.support.errors import RunError
from muxtune.support.tables import format_table
from muxtune.tasks import workload_from
from runtime.tasks.checkpoint import RunCheckpoints
from sim import search_plan

MODEL = "llama-tiny"
STEPS_PER_KILL = 24
"""So many that the run does not end before the last kill."""
EVERY = 10
"""Steps from one checkpoint to the next; a kill comes after one."""
MOST_LATER_S = 0.05
"""A kill comes up to so much later than a checkpoint."""
START_SHARE = 0.25
"""Share of kills that come while processes start."""
START_S = 6.0
END_LIMIT_S = 10.0
TRAIN_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run that was killed."""

    kills: Counter[str]
    """By what was killed."""
    resumed_at: list[int]
    """Iterations that were done at each kill, by the checkpoints there."""
    slowest_end_s: float
    """Longest time from a kill to the end of the last process."""
    differences: list[str]
    """Files that differ from those of the undisturbed run."""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcome = kill_and_resume(Path(name), kills=arguments.kills, seed=arguments.seed)
    print(machine_line())
    rows = [[victim, str(kills)] for victim, kills in sorted(outcome.kills.items())]
    print(format_table(["killed", "times"], rows))
    print(f"iterations kept at each kill: {', '.join(map(str, outcome.resumed_at))}")
    print(f"all processes had ended within {outcome.slowest_end_s:.1f} s of each kill")
    for difference in outcome.differences:
        print(f"differs: {difference}")
    print("differences: none" if not outcome.differences else "something was lost")
    sys.exit(bool(outcome.differences) or outcome.slowest_end_s > END_LIMIT_S)


def kill_and_resume(
    folder: Path, *, kills: int, seed: int = 0, steps_per_kill: int = STEPS_PER_KILL
) -> Outcome:
    """Kill a run so many times, and compare it with one that was left alone.

    Args:
        folder: Both runs go there.
        kills: Number of kills.
        seed: Seed of what is killed, and when.
        steps_per_kill: Steps of the tasks, per kill.

    Raises:
        RunError: The run ended before the last kill, or does not train.
    """
    draw = random.Random(seed)
    plan = make_plan(steps_per_kill * (kills + 1))
    save_plan(plan, folder / "plan.json")
    whole, killed = folder / "whole", folder / "killed"
    _finish(folder, whole)
    victims: Counter[str] = Counter()
    kept: list[int] = []
    slowest_s = 0.0
    checkpoints = RunCheckpoints(killed, plan)
    for _ in range(kills):
        parent = _start(folder, killed)
        try:
            if draw.random() < START_SHARE:
                time.sleep(draw.uniform(0.0, START_S))
            else:
                behind = (checkpoints.newest or 0) + EVERY
                _wait(lambda behind=behind: (checkpoints.newest or 0) >= behind, parent)  # type: ignore[misc]
                time.sleep(draw.uniform(0.0, MOST_LATER_S))
            if parent.poll() is not None:
                raise RunError(f"the run ended with {parent.returncode} before it was killed")
            victim, pids = _choose(draw, parent, killed)
            victims[victim] += 1
            for pid in pids:
                _kill(pid)
            begin_s = time.monotonic()
            parent.wait(60)
            while _ranks(killed):
                time.sleep(0.02)
                if time.monotonic() - begin_s > TRAIN_LIMIT_S:
                    raise RunError("ranks keep running after a kill")
            slowest_s = max(slowest_s, time.monotonic() - begin_s)
        finally:
            for pid in [*_ranks(killed), parent.pid]:
                _kill(pid)
            parent.wait()
        kept.append(checkpoints.newest or 0)
    _finish(folder, killed)
    return Outcome(victims, kept, slowest_s, _differences(plan, whole, killed))


def make_plan(steps: int) -> Plan:
    """Three tasks in two hTasks on two stages; priced for A40s, which decides nothing here."""
    task = {
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "max_length": 16,
        "learning_rate": 1e-3,
        "steps": steps,
        "shuffle": True,
    }
    peft = {"method": "lora", "r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
    tasks = [task | {"id": name, "peft": peft, "seed": seed} for seed, name in enumerate("abc")]
    workload = workload_from({"backbone": MODEL, "tasks": tasks}, "the benchmark's workload", Path())
    model, cluster = load_model_spec(MODEL), load_cluster("testbed-a")
    costs = AnalyticCosts(cluster.device.name, model, interconnect_of(cluster))
    options = PlanOptions(partition="a+b,c", tp=1, pp=2, dp=1, template="continuous", alignment="pack")
    return search_plan(workload, model, cluster, costs, policy="muxtune", options=options)


def _start(folder: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    code = "from muxtune.cli.app import main; main()"
    words = ["run", str(folder / "plan.json"), "--out", str(run_dir), "--resume", "--device", "cpu"]
    with (folder / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-Pc", code, *words], stdout=log, stderr=log)


def _finish(folder: Path, run_dir: Path) -> None:
    code = _start(folder, run_dir).wait()
    if code:
        last = (folder / f"{run_dir.name}.log").read_text().splitlines()[-1:]
        raise RunError(f"a run that nobody killed ended with {code}: {' '.join(last)}")


def _wait(condition: Callable[[], bool], parent: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + TRAIN_LIMIT_S
    while not condition() and parent.poll() is None:
        if time.monotonic() > deadline_s:
            raise RunError(f"the run did not come to its next checkpoints within {TRAIN_LIMIT_S:.0f} s")
        time.sleep(0.02)


def _choose(draw: random.Random, parent: subprocess.Popen[bytes], run_dir: Path) -> tuple[str, list[int]]:
    """What to kill, and its process ids; the parent alone while there are no ranks yet."""
    ranks = _ranks(run_dir)
    kind = draw.choice(["a rank", "the parent", "all"]) if ranks else "the parent"
    if kind == "a rank":
        return kind, [draw.choice(ranks)]
    return kind, [parent.pid, *(ranks if kind == "all" else [])]


def _ranks(run_dir: Path) -> list[int]:
    """Process ids of the living ranks of a run (Linux)."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if len(words) > 3 and b"runtime.engine.rank" in words[2] and str(run_dir).encode() in words[3]:
            pids.append(int(path.parent.name))
    return sorted(pids)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _differences(plan: Plan, whole: Path, killed: Path) -> list[str]:
    found = []
    for task in plan.tasks:
        adapter = Path("tasks") / task.id / "adapter" / "adapter_model.safetensors"
        expected, tensors = load_file(whole / adapter), load_file(killed / adapter)
        if expected.keys() != tensors.keys() or any(not tensors[k].equal(t) for k, t in expected.items()):
            found.append(str(adapter))
        losses = Path("tasks") / task.id / "losses.csv"
        rows = [
            [line.split(",")[:3] for line in (run_dir / losses).read_text().split()]
            for run_dir in (whole, killed)
        ]
        if rows[0] != rows[1]:
            found.append(str(losses))
    return found


if __name__ == "__main__":
    main()
