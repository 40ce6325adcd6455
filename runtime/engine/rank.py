"""One rank of a run, from its first action to its results; and the entry point of a rank that was spawned."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from muxtune.plan import Plan, extend_schedule, load_plan
from muxtune.schedule import save_trace
from muxtune.support.errors import MuxTuneError, UserError
from muxtune.support.processes import end_process, end_with_parent
from runtime.backbone.held_bytes import rotary_table_bytes
from runtime.distributed.agreement import all_gather, barrier, common_origin_ns, gather
from runtime.distributed.meeting import meet
from runtime.distributed.peers import PeerLostError
from runtime.distributed.sharding import Part, assemble
from runtime.engine.job import PEER_LOST_EXIT_CODE, USER_ERROR_EXIT_CODE, RunJob
from runtime.engine.meter import ActionMeter
from runtime.engine.ready import ReadyRank, prepare_rank
from runtime.engine.recorder import Recorder
from runtime.engine.runner import StageRunner
from runtime.engine.stepper import Stepper
from runtime.reports.footprint import MeasuredMemory, measure_memory
from runtime.reports.live import LiveProgress
from runtime.reports.report import build_report, save_report, stage_records
from runtime.tasks.adapter_files import save_adapter
from runtime.tasks.checkpoint import CheckpointWriter, RunCheckpoints, writing_ranks
from runtime.tasks.losses import LossLedger
from runtime.tasks.outputs import (
    ADAPTER,
    ADAPTER_INIT,
    RUN_BEFORE,
    load_status,
    save_progress,
    task_folder,
)
from runtime.tasks.verdict import NonFiniteError, end_rank


class RankRun:
    """One rank's part of a run.

    Args:
        plan: Plan that has been checked.
        job: Job of the run.
        ready: The rank, ready to train.
        progress: Kept up to date with the number of finished iterations, on rank 0.
    """

    def __init__(self, plan: Plan, job: RunJob, ready: ReadyRank, progress: Path | None = None) -> None:
        self._plan = plan
        self._job = job
        self._ready = ready
        self._mesh = ready.mesh
        self._progress = progress
        self._actions = extend_schedule(plan, job.steps, first=job.first_step)[ready.mesh.stage]
        self._steps_to_come = Counter(a.number for a in self._actions if a.kind == "STEP")
        self._meter = ActionMeter(plan.microbatches, job.metered_steps, ready.device.memory_trace)
        self._recorder = Recorder(ready.mesh, plan.microbatches)
        self._losses = self._recorder.losses
        self._writer = self._build_writer()
        self._live = LiveProgress(
            job.out_dir,
            plan,
            ready.feed,
            ready.tenants,
            self._losses,
            first_step=job.first_step,
            steps=job.steps,
        )

    def execute(self) -> None:
        """Train, and write everything that this rank has to write.

        Raises:
            RunError: Another rank is gone, or the run's folder is; with ``strict`` also that a task fails.
        """
        plan, ready = self._plan, self._ready
        tenants = [[ready.tenants[task_id] for task_id in htask.task_ids] for htask in plan.htasks]
        ledger = LossLedger(ready.feed, plan.microbatches)
        stepper = Stepper(
            ready.mesh,
            tenants,
            ledger,
            self._recorder,
            faults=ready.feed.faults,
            on_fault=self._after_fault,
            on_step=self._after_step,
        )
        runner = StageRunner(
            plan,
            ready.mesh,
            self._actions,
            feed=ready.feed,
            stages=ready.stages,
            ledger=ledger,
            stepper=stepper,
            recorder=self._recorder,
            meter=self._meter,
        )
        if self._job.first_step:
            self._restore()
        elapsed_s = max((x.wall_s for losses in self._losses.values() for x in losses), default=0.0)
        self._save_progress("running")
        try:
            runner.run(common_origin_ns(), elapsed_s)
            self._check_state()
        except NonFiniteError as error:
            error = error.keeping(self._kept(error.step))
            self._ready.tenants[error.task_id].fail(error.step, str(error))
            self._save_progress("running")
            raise error from None
        self._save_progress("finished")
        self._save_results()

    def _check_state(self) -> None:
        """The last steps have no loss after them that would show what they did."""
        tenants = self._ready.tenants
        bad = [
            task_id
            for task_id, tenant in tenants.items()
            if tenant.failure is None and not tenant.is_finite()
        ]
        for task_id in dict.fromkeys(task_id for of_rank in all_gather(bad) for task_id in of_rank):
            step = min(self._job.steps, tenants[task_id].task.steps) - 1
            self._after_fault(task_id, step, "adapter or optimizer state is not finite after it")

    def _after_fault(self, task_id: str, step: int, what: str) -> None:
        """Go on without a task, or end the run; all ranks come here before the task's next step.

        Raises:
            NonFiniteError: The run is strict; on the rank that writes the losses.
            PeerLostError: The run is strict; on all others.
        """
        error = NonFiniteError(task_id, step, what)
        if self._job.strict:
            end_rank(self._mesh, error)
        self._leave(task_id, step, str(error))
        self._save_progress("running", [task_id])

    def _leave(self, task_id: str, step: int, reason: str) -> None:
        self._ready.tenants[task_id].fail(step, reason)
        self._ready.feed.leave(task_id, step + 1)

    def _kept(self, step: int) -> str:
        """What is left of a run whose step failed, and how to go on."""
        kept = RunCheckpoints(self._job.out_dir, self._plan).newest
        if kept is None:
            again = f"; a new run with --steps {step} ends before the step that failed" if step else ""
            return f"no checkpoint was written before it{again}"
        text = f"the checkpoint of step {kept} is kept"
        if kept < step:
            return f"{text}: --resume --steps {step} ends before the step that failed"
        return f"{text}: --resume goes on from it"

    def _build_writer(self) -> CheckpointWriter:
        return CheckpointWriter(
            self._job.out_dir,
            self._ready.rank % writing_ranks(self._plan),
            plan=self._plan,
            tenants=self._ready.tenants,
            losses=self._losses,
            every=self._job.checkpoint_every,
            steps=self._job.steps,
            strict=self._job.strict,
        )

    def _restore(self) -> None:
        checkpoints = RunCheckpoints(self._job.out_dir, self._plan)
        for task_id, (step, reason) in checkpoints.failed(self._job.first_step).items():
            self._leave(task_id, step, reason)
        for task_id, tenant in self._ready.tenants.items():
            state = checkpoints.load(task_id, self._job.first_step)
            if state is not None:
                tenant.restore(state.part_of(tenant))
                if self._mesh.last:  # or a rank would write on what it has of them, and never add to it
                    self._losses[task_id] = list(state.losses)

    def _after_step(self, htask: int, step: int) -> None:
        self._ready.watch.check()
        if self._mesh.replica == 0:
            written = self._writer.after_step(htask, step)
            self._save_progress("running", written)
        if self._mesh.last and self._mesh.reports:
            self._live.write()
        self._steps_to_come[step] -= 1
        if self._progress is not None and self._steps_to_come[step] == 0:
            self._progress.write_text(str(step + 1))

    def _save_progress(
        self, state: Literal["running", "finished"], task_ids: Sequence[str] | None = None
    ) -> None:
        """Write what became of these tasks, or of all."""
        if self._mesh.last and self._mesh.reports:
            self._ready.watch.check()
            for task in self._plan.tasks:
                if task_ids is None or task.id in task_ids:
                    failure = self._ready.tenants[task.id].failure
                    save_progress(self._job.out_dir, task, self._losses[task.id], state, failure)
            if task_ids is None:
                self._live.write(now=True)

    def _save_results(self) -> None:
        """Adapters and trace, and at the very end the report: a run that has one is whole."""
        plan, job, ready = self._plan, self._job, self._ready
        ready.watch.check()
        for task in plan.tasks:
            failed = ready.tenants[task.id].failure is not None
            ranks = [] if failed else gather(self._adapter_parts(task.id))
            if ready.rank == 0:
                self._save_adapter(task.id, self._last_good(task.id) if failed else assemble(ranks))
        record = self._recorder.record(self._measure_memory())
        records = stage_records(gather(record), plan.parallelism)
        if ready.rank == 0:
            spans = [span for record in records for span in record.spans]
            operators = [operator for record in records for operator in record.operators]
            save_trace(job.out_dir / "trace.json", spans, "runtime", operators)
            report = build_report(
                plan,
                steps=job.steps,
                first_step=job.first_step,
                records=records,
                tokens=[ready.feed.step_tokens(k) for k in range(job.first_step, job.steps)],
                device=job.device,
                stops={task_id: tenant.stop for task_id, tenant in ready.tenants.items()},
                tasks=[load_status(job.out_dir, task.id) for task in plan.tasks],
            )
            ready.watch.check()
            save_report(report, job.out_dir / "run.json")
            (job.out_dir / RUN_BEFORE).unlink(missing_ok=True)
        barrier()

    def _save_adapter(self, task_id: str, tensors: Mapping[str, Tensor]) -> None:
        folder = task_folder(self._job.out_dir, task_id)
        if tensors:
            save_adapter(folder / ADAPTER, tensors, like=folder / ADAPTER_INIT)

    def _last_good(self, task_id: str) -> Mapping[str, Tensor]:
        """Adapter of a failed task in its newest checkpoint; nothing if it has none.

        Its tenants are no place to look: some may have taken the step that failed on others.
        """
        state = RunCheckpoints(self._job.out_dir, self._plan).last(task_id)
        return {} if state is None else state.tensors["adapter"]

    def _measure_memory(self) -> MeasuredMemory:
        plan, ready = self._plan, self._ready
        return measure_memory(
            self._actions,
            microbatches=plan.microbatches,
            carries=plan.carries,
            backbone_bytes=ready.backbone_bytes,
            table_bytes=sum(rotary_table_bytes(stage) for stage in ready.stages.values()),
            htask_tenants=[[ready.tenants[task_id] for task_id in htask.task_ids] for htask in plan.htasks],
            seen=self._meter.seen,
            process_start_bytes=ready.process_start_bytes,
            device_peak_bytes=ready.device.peak_bytes(),
        )

    def _adapter_parts(self, task_id: str) -> dict[str, Part]:
        """What this rank adds to the saved adapter; replicas have the same, so one of them is enough."""
        if self._mesh.replica:
            return {}
        tenant = self._ready.tenants[task_id]
        return {key: (tenant.portions[key], p.detach().cpu()) for key, p in tenant.parameters.items()}


def main() -> None:
    """Entry point of a spawned rank; arguments: job, rank, folder to meet in."""
    job, rank, meeting = RunJob.model_validate_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    _report_cause(meeting / f"cause-{rank}")
    end_with_parent()
    plan = load_plan(job.out_dir / "plan.json")
    world = plan.parallelism.ranks
    if world > 1:
        store = dist.FileStore(str(meeting / "store"), world)  # type: ignore[attr-defined]  # not in stub
        meet(store, rank, world, job.peer_timeout_s)
    RankRun(plan, job, prepare_rank(plan, job, rank), meeting / "progress" if rank == 0 else None).execute()
    if dist.is_initialized():
        dist.destroy_process_group()
    end_process()


def _report_cause(path: Path) -> None:
    """Leave the last line of an uncaught exception for the parent, and exit without waiting for peers."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        path.write_text(f"{error}" if issubclass(kind, MuxTuneError) else f"{kind.__name__}: {error}")
        # torch.distributed wraps this hook, and keeps what goes to sys.stderr until the hook returns.
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        codes = {UserError: USER_ERROR_EXIT_CODE, PeerLostError: PEER_LOST_EXIT_CODE}
        os._exit(next((code for each, code in codes.items() if issubclass(kind, each)), 1))

    sys.excepthook = hook
