"""A real run whose later iterations are watched: how long actions take, and what of it torch's kernels take.

The first iteration warms up. What follows is timed by the run itself, without a profiler on the clock of the
thread's processor time, which other programs on the machine do not stop; or on the wall's clock under a
profiler: torch's (:mod:`benchmarks.helpers.kernel_time`), or Python's own cProfile.

    python -m benchmarks.helpers.overhead_run WATCH RANK FOLDER      one rank, started by watch_run
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from cProfile import Profile
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import Literal

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from benchmarks.helpers.kernel_time import KernelTimes
from muxtune.plan import Plan, load_plan, save_plan
from muxtune.schedule import COMPUTE, Action
from runtime.device.stopwatch import HostStopwatch
from runtime.distributed.agreement import barrier
from runtime.engine.job import RunJob
from runtime.engine.rank import RankRun
from runtime.engine.ready import ReadyRank, prepare_rank

Kind = Literal["F", "B"]
Profiler = Literal["none", "torch", "python"]


class ActionTimes(BaseModel):
    """Forward or backward of one hTask on one stage, the fastest of its micro-batches, in seconds.

    What else runs on the machine only adds.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    htask: int
    kind: Kind
    action_s: float
    """Seconds of processor time without a profiler, else of wall time."""
    kernel_s: float = 0.0
    """Seconds inside of operators that compute, under torch's profiler."""
    bookkeeping_s: float = 0.0
    """Seconds inside of operators that describe or allocate, under torch's profiler."""
    operators: int = 0


class FunctionTime(BaseModel):
    """A function in the profile of Python."""

    model_config = ConfigDict(frozen=True)

    name: str
    builtin: bool
    """Not written in Python; operators of torch are among these."""
    calls: int
    own_s: float
    """Seconds without what it calls."""


class Watch(BaseModel):
    """What to do, and under which profiler."""

    model_config = ConfigDict(frozen=True)

    job: RunJob
    profiler: Profiler


class WatchedStage(BaseModel):
    """What one rank has seen."""

    model_config = ConfigDict(frozen=True)

    actions: list[ActionTimes]
    functions: list[FunctionTime]
    """Functions that Python's profiler saw."""
    watched: int
    """Forwards and backwards after the first iteration."""


def watch_run(plan: Plan, profiler: Profiler, *, steps: int) -> list[WatchedStage]:
    """Run a plan of one replica and whole stages on processes of its own.

    Args:
        plan: Plan whose tasks have more than ``steps`` steps.
        profiler: Profiler to watch with, if any.
        steps: Iterations to watch, after the first.
    """
    with TemporaryDirectory() as folder:
        out_dir = Path(folder) / "run"
        out_dir.mkdir(parents=True)
        save_plan(plan, out_dir / "plan.json")
        job = RunJob(out_dir=out_dir, steps=1 + steps, first_step=0, checkpoint_every=steps + 2)
        watch = Watch(job=job, profiler=profiler)
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "KINETO_LOG_LEVEL": "99",
        }
        command = [sys.executable, "-m", "benchmarks.helpers.overhead_run", watch.model_dump_json()]
        ranks = range(plan.parallelism.ranks)
        processes = [subprocess.Popen([*command, str(rank), folder], env=environment) for rank in ranks]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"a watched rank failed: exit codes {codes}")
        files = [Path(folder) / f"watched-{rank}.json" for rank in ranks]
        return [WatchedStage.model_validate_json(file.read_text()) for file in files]


class _OwnClock(HostStopwatch):
    """Times spans by a clock of the watcher's, and counts from that clock's own origin.

    Args:
        clock_ns: The clock.
    """

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        super().__init__()
        self._clock_ns = clock_ns

    def begin(self, origin_ns: int) -> None:
        """Nothing: the run's origin is another clock's."""

    def now(self) -> int:
        """Read the clock."""
        return self._clock_ns()


class _WatchedRank(RankRun):
    """Starts the profiler after the first iteration, and looks at the recorded spans in the end."""

    def __init__(self, plan: Plan, watch: Watch, ready: ReadyRank) -> None:
        ready.mesh.stopwatch = _OwnClock(_clock_ns(watch.profiler))
        super().__init__(plan, watch.job, ready)
        self._profiler = watch.profiler
        self._clock_ns = _clock_ns(watch.profiler)
        self._kernels = KernelTimes()
        self._python = Profile()
        self._started_ns: int | None = None

    def _after_step(self, htask: int, step: int) -> None:
        super()._after_step(htask, step)
        if self._started_ns is not None:
            return
        self._started_ns = self._clock_ns()
        if self._profiler == "torch":
            self._kernels.__enter__()
        elif self._profiler == "python":
            self._python.enable()

    def _save_results(self) -> None:
        if self._profiler == "torch":
            self._kernels.__exit__(None, None, None)
        elif self._profiler == "python":
            self._python.disable()
        barrier()  # nobody needs what the run has learned

    def seen(self) -> WatchedStage:
        """The fastest actions per hTask and kind."""
        assert self._started_ns is not None
        stretches: dict[Action, list[tuple[int, int]]] = defaultdict(list)
        for span in self._recorder.spans:
            if span.stream == COMPUTE and span.action.kind != "STEP":
                stretches[span.action].append((_reading_ns(span.start_s), _reading_ns(span.end_s)))
        timed: dict[tuple[int, Kind], list[tuple[float, list[tuple[int, int]]]]] = defaultdict(list)
        for action, parts in stretches.items():
            first_iteration = action.number < self._plan.microbatches[action.htask]
            if parts[0][0] >= self._started_ns and not first_iteration:
                seconds = sum(end_ns - start_ns for start_ns, end_ns in parts) / 1e9
                timed[action.htask, _kind(action)].append((seconds, parts))
        return WatchedStage(
            actions=[self._times(key, *min(timed[key])) for key in sorted(timed)],
            functions=self._functions(),
            watched=sum(map(len, timed.values())),
        )

    def _times(self, key: tuple[int, Kind], action_s: float, stretches: list[tuple[int, int]]) -> ActionTimes:
        htask, kind = key
        stage = self._mesh.stage
        if self._profiler != "torch":
            return ActionTimes(stage=stage, htask=htask, kind=kind, action_s=action_s)
        parts = [self._kernels.between(*stretch) for stretch in stretches]
        return ActionTimes(
            stage=stage,
            htask=htask,
            kind=kind,
            action_s=action_s,
            kernel_s=sum(part.kernel_s for part in parts),
            bookkeeping_s=sum(part.bookkeeping_s for part in parts),
            operators=sum(part.operators for part in parts),
        )

    def _functions(self) -> list[FunctionTime]:
        if self._profiler != "python":
            return []
        return [
            FunctionTime(
                name=_describe(entry.code),
                builtin=isinstance(entry.code, str),
                calls=entry.callcount,
                own_s=entry.inlinetime,
            )
            for entry in self._python.getstats()
        ]


def _clock_ns(profiler: Profiler) -> Callable[[], int]:
    """Processor time, which nobody else's programs stop, or the time that torch's profiler can be held to."""
    return time.thread_time_ns if profiler == "none" else time.perf_counter_ns


def _reading_ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _kind(action: Action) -> Kind:
    return "F" if action.kind == "F" else "B"


def _describe(code: CodeType | str) -> str:
    if isinstance(code, str):
        return code.strip("<>").removeprefix("built-in method ")
    parts = Path(code.co_filename).with_suffix("").parts[-2:]
    return f"{'.'.join(parts)}:{code.co_qualname}"


def _watch_rank(watch: Watch, rank: int, folder: Path) -> None:
    plan = load_plan(watch.job.out_dir / "plan.json")
    if plan.parallelism.ranks > 1:
        store = (folder / "store").as_uri()
        dist.init_process_group("gloo", store, rank=rank, world_size=plan.parallelism.ranks)
    run = _WatchedRank(plan, watch, prepare_rank(plan, watch.job, rank))
    run.execute()
    (folder / f"watched-{rank}.json").write_text(run.seen().model_dump_json())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _watch_rank(Watch.model_validate_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
