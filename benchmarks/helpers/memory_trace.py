"""Every byte that the ranks of a run allocate, as torch's allocator reports it.

The run's own count adds up what it knows of. Here nothing is known beforehand: it is the most bytes that were
allocated at once while the actions were played, temporaries inside of operators included.

    python -m benchmarks.helpers.memory_trace JOB RANK FOLDER      one rank, started by traced_peaks
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch.autograd.profiler import profile, record_function

from muxtune.plan import Plan, load_plan, save_plan
from runtime.device.allocations import allocation_curve
from runtime.engine.job import RunJob
from runtime.engine.rank import RankRun
from runtime.engine.ready import prepare_rank

_PLAYING = "benchmarks.helpers.memory_trace: playing"


def traced_peaks(plan: Plan, *, steps: int) -> list[int]:
    """Run a plan and return the most bytes that each rank had allocated at once while it trained."""
    with TemporaryDirectory() as folder:
        out_dir = Path(folder) / "run"
        out_dir.mkdir(parents=True)
        save_plan(plan, out_dir / "plan.json")
        job = RunJob(out_dir=out_dir, steps=steps, first_step=0, checkpoint_every=steps + 1)
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "KINETO_LOG_LEVEL": "99",
        }
        command = [sys.executable, "-m", "benchmarks.helpers.memory_trace", job.model_dump_json()]
        ranks = [
            subprocess.Popen([*command, str(rank), folder], env=environment)
            for rank in range(plan.parallelism.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"a traced rank failed: exit codes {codes}")
        return [int((Path(folder) / f"peak-{rank}").read_text()) for rank in range(len(ranks))]


def _trace_rank(job: RunJob, rank: int, folder: Path) -> None:
    plan = load_plan(job.out_dir / "plan.json")
    if plan.parallelism.ranks > 1:
        dist.init_process_group(
            "gloo", (folder / "store").as_uri(), rank=rank, world_size=plan.parallelism.ranks
        )
    with profile(use_cpu=True, profile_memory=True, use_kineto=True) as trace:
        run = RankRun(plan, job, prepare_rank(plan, job, rank))
        with record_function(_PLAYING):
            run.execute()
    assert trace.kineto_results is not None
    (playing,) = (event for event in trace.kineto_results.events() if event.name() == _PLAYING)
    peak = max(
        bytes_
        for ns, bytes_ in allocation_curve(trace)
        if playing.start_ns() <= ns <= playing.start_ns() + playing.duration_ns()
    )
    (folder / f"peak-{rank}").write_text(str(peak))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _trace_rank(RunJob.model_validate_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
