"""Executes a plan for real: check everything, start the ranks (or be one of torchrun's), report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from muxtune.cluster import DeviceKind
from muxtune.model import is_pickled, weight_files
from muxtune.plan import (
    BACKBONE_RECORD,
    Plan,
    check_backbone,
    check_plan,
    check_recorded,
    check_step_meetings,
    extend_schedule,
    load_plan,
    record_backbone,
    save_plan,
)
from muxtune.support.errors import SpecError, UserError, naming
from muxtune.support.processes import end_when_stopped, keeping, under_torchrun
from muxtune.support.run_folder import LOCK, is_temporary, locked, refuse_if_locked, remove_temporaries
from runtime.attention import attention_site, check_attention
from runtime.backbone.hugging_face import check_pickled
from runtime.data.feed import check_room, load_plan_data
from runtime.device.devices import check_devices, check_memory, rank_device
from runtime.distributed.agreement import all_gather, refuse_together
from runtime.engine.job import PEER_TIMEOUT_S, PEER_TIMEOUTS_S, RunJob, RunOptions
from runtime.engine.rank import RankRun
from runtime.engine.ready import prepare_rank
from runtime.launch.local import launch_ranks
from runtime.launch.torchrun import check_node_place, job_place, joined
from runtime.launch.watching import watched
from runtime.ops.kernels import kernel_mode
from runtime.reports.report import RunReport, load_report
from runtime.tasks.checkpoint import RunCheckpoints
from runtime.tasks.outputs import RUN_BEFORE

PLANS = "plans"
"""Folder of a run's folder with every plan that was in force, by the iteration at which it began."""
_EARLIER_CHECKPOINTS = "checkpoints"
"""Folder in which earlier versions kept the checkpoints of all tasks together."""


def run_plan(plan: Plan | Path, out_dir: Path, options: RunOptions | None = None) -> RunReport:
    """Train all tasks of a plan on the ranks that it asks for.

    Spawns the ranks on this machine. In a process that torchrun started it is one rank of that job instead,
    and ``out_dir`` must be a folder that all ranks share.

    Args:
        plan: A plan or its file.
        out_dir: Where results go (RUN_DIR); new or empty, unless the run is resumed.
        options: Options of the run; the usual ones by default.

    Returns:
        What stands in ``run.json``.

    Raises:
        UserError: Something about the plan, the data or the folder is wrong; nothing was started or written.
        RunError: A rank failed; the newest checkpoints are kept.
        Stopped: A signal came that :func:`muxtune.support.processes.stoppable` waits for; says what is kept.
    """
    options = RunOptions() if options is None else options
    if under_torchrun():
        return _join(plan, out_dir, options)
    plan, iterations = _checked(plan, options)
    with _own_folder(out_dir, resume=options.resume) as lock:
        first_step = _prepare_folder(plan, out_dir, iterations, resume=options.resume)
        if first_step is None:
            return load_report(out_dir / "run.json")
        device = plan.cluster.device.kind
        job = RunJob.of(options, out_dir, steps=iterations, first_step=first_step, device=device, lock=lock)
        with keeping(partial(_kept, plan, out_dir, iterations)), watched(job) as on_progress:
            launch_ranks(job, plan.parallelism.ranks, on_progress)
        return load_report(out_dir / "run.json")


def _checked(plan: Plan | Path, options: RunOptions) -> tuple[Plan, int]:
    """The plan and its iterations, if nothing is wrong that can be seen before a rank starts."""
    where = "plan"
    if isinstance(plan, Path):
        where = str(plan)
        plan = load_plan(plan)
    else:
        check_plan(plan)
    for name in ("checkpoint_every", "metered_steps"):
        if getattr(options, name) < 1:
            raise SpecError(name, getattr(options, name), "at least 1")
    if not _may_wait(options.peer_timeout_s):
        shortest_s, longest_s = PEER_TIMEOUTS_S
        expected = f"seconds above 0, {shortest_s} to {longest_s:.0f} (a week)"
        raise SpecError("peer_timeout_s", options.peer_timeout_s, expected)
    iterations = max(plan.htask_steps()) if options.steps is None else options.steps
    kind, field = plan.cluster.device.kind, f"{where}: decisions.cluster.device.kind"
    if options.device is not None:
        kind, field = options.device, "device"
    check_devices(kind, plan.parallelism.ranks, field)
    _check(plan, iterations, where, kind)
    return plan, iterations


def _may_wait(peer_timeout_s: float) -> bool:
    shortest_s, longest_s = PEER_TIMEOUTS_S
    return shortest_s <= peer_timeout_s <= longest_s  # false for nan, too


def _check(plan: Plan, iterations: int, where: str, kind: DeviceKind) -> None:
    kernel_mode()  # refuses a MUXTUNE_KERNELS that means nothing
    mesh, peaks_bytes = plan.parallelism, plan.predicted.peak_memory_bytes
    with naming(where):
        site = attention_site(plan.model, rank_device(kind, 0).name)
        check_attention(plan.execution.attention, site, "decisions.execution.attention")
    needed_bytes = [peaks_bytes[rank // mesh.tp % mesh.pp] for rank in range(mesh.ranks)]
    check_memory(kind, needed_bytes, f"{where}: predicted.peak_memory_bytes")
    check_backbone(plan, where, digests=not under_torchrun() or os.environ.get("LOCAL_RANK") == "0")
    if plan.model.source != "preset" and is_pickled(weight_files(Path(plan.model.source))):
        check_pickled(plan.model)
    schedule = extend_schedule(plan, iterations)
    clipping = [h.id for h in plan.htasks if any(t.max_grad_norm is not None for t in plan.htask_tasks(h.id))]
    check_step_meetings(schedule, clipping, where)
    check_room(plan, load_plan_data(plan), where)


@contextmanager
def _own_folder(out_dir: Path, *, resume: bool) -> Iterator[int]:
    """Have the folder for this run alone; made if there is none.

    Yields:
        The descriptor that holds its lock.

    Raises:
        UserError: It is not a run's, not to be gone on with, or in use.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file; expected a folder for the run")
    if out_dir.exists():
        refuse_if_locked(out_dir)
        _check_content(out_dir, resume=resume)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out_dir} cannot be made: {error.strerror}; expected a folder for the run"
        ) from error
    with locked(out_dir) as lock:
        _check_content(out_dir, resume=resume)
        remove_temporaries(out_dir)
        yield lock


def _check_content(out_dir: Path, *, resume: bool) -> None:
    if not _has_content(out_dir):
        return
    if not resume:
        raise UserError(f"{out_dir} is not empty; expected a new folder, or --resume to continue its run")
    if not (out_dir / "plan.json").is_file():
        raise UserError(f"{out_dir} has no plan.json; expected the folder of a run to resume")


def _has_content(out_dir: Path) -> bool:
    """Whether more lies there than what a start that was killed at once leaves, before there is a plan."""
    return not all(
        path.name in {LOCK, BACKBONE_RECORD, PLANS} or is_temporary(path) for path in out_dir.iterdir()
    )


def _prepare_folder(plan: Plan, out_dir: Path, iterations: int, *, resume: bool) -> int | None:
    """Make the folder ready for a start or for going on.

    Returns:
        Iterations that are already done; None if all are, and the report is there.
    """
    if not _has_content(out_dir):
        record_backbone(plan, out_dir)
        _put_in_force(plan, out_dir, 0)
        return 0
    assert resume
    before = load_plan(out_dir / "plan.json")
    if before != plan:
        _check_same_tasks(before, plan, out_dir)
    check_recorded(plan, out_dir)
    report, report_before = out_dir / "run.json", out_dir / RUN_BEFORE
    finished = max((load_report(path).steps for path in (report, report_before) if path.exists()), default=0)
    if iterations < finished:
        expected = f"at least {finished}, the steps of the finished run in {out_dir}"
        raise SpecError("steps", iterations, expected)
    if report.exists() and iterations == finished:
        return None
    first_step = _find_checkpoint(plan, out_dir, iterations)
    if before != plan:
        _put_in_force(plan, out_dir, first_step)
    if report.exists():
        report.replace(report_before)
    return first_step


def _find_checkpoint(plan: Plan, out_dir: Path, iterations: int) -> int:
    """Iterations after which the run goes on; what lies there of later ones makes room."""
    if (out_dir / _EARLIER_CHECKPOINTS).exists():
        raise UserError(
            f"{out_dir / _EARLIER_CHECKPOINTS}: of an earlier version of muxtune, which cannot be read; "
            "expected a new folder for the run"
        )
    checkpoints = RunCheckpoints(out_dir, plan)
    found = checkpoints.whole()
    if found.complaints and found.iteration is None:
        raise UserError(f"no checkpoint to resume from: {'; '.join(found.complaints)}")
    first_step = found.iteration or 0
    if first_step >= iterations:
        raise SpecError("steps", iterations, f"more than {first_step}, where the newest checkpoint stands")
    for complaint in found.complaints:
        warnings.warn(f"{complaint}; going on from the one of step {first_step}", stacklevel=2)
    checkpoints.clear_newer(first_step, found.damaged)
    return first_step


def _check_same_tasks(before: Plan, plan: Plan, out_dir: Path) -> None:
    """Refuse to go on with a plan whose tasks or backbone are not those of the run."""
    if (before.tasks_by_id, before.model) != (plan.tasks_by_id, plan.model):
        expected = f"the plan in {out_dir / 'plan.json'}, or another plan for its tasks and its backbone"
        raise UserError(f"{out_dir} has a run of other tasks; expected {expected}")


def _put_in_force(plan: Plan, out_dir: Path, first_step: int) -> None:
    """Note the plan that the run follows from an iteration on."""
    for path in (out_dir / PLANS).glob("from-*.json"):
        if int(path.stem.removeprefix("from-")) > first_step:
            path.unlink()  # from before it was set back
    save_plan(plan, out_dir / PLANS / f"from-{first_step:06d}.json")
    save_plan(plan, out_dir / "plan.json")  # last: a folder that has one can be resumed


def _kept(plan: Plan, out_dir: Path, iterations: int) -> str:
    """What is left of a run that was stopped, and how to go on."""
    newest = RunCheckpoints(out_dir, plan).newest
    at = f"the checkpoint of step {newest} of {iterations}" if newest else "no checkpoint yet"
    return f"{at} is kept in {out_dir}; the same command with --resume goes on"


def _join(plan: Plan | Path, out_dir: Path, options: RunOptions) -> RunReport:
    """Be one rank of torchrun's job; rank 0 prepares the folder and tells the others."""
    rank, world = job_place()

    def check_world() -> tuple[Plan, int]:
        check_node_place()
        checked, iterations = _checked(plan, options)
        ranks = checked.parallelism.ranks
        if world != ranks:
            raise UserError(
                f"torchrun started {world} ranks (WORLD_SIZE); expected {ranks}, those of the plan"
            )
        return checked, iterations

    timeout_s = options.peer_timeout_s
    # They have to meet before they can refuse together what is no time at all.
    with joined(rank, world, timeout_s if _may_wait(timeout_s) else PEER_TIMEOUT_S):
        checked, iterations = refuse_together(check_world)
        with ExitStack() as until_end, end_when_stopped(partial(_kept, checked, out_dir, iterations), rank):

            def prepare() -> int | None:
                if rank:
                    return None
                until_end.enter_context(_own_folder(out_dir, resume=options.resume))
                return _prepare_folder(checked, out_dir, iterations, resume=options.resume)

            first_step = all_gather(refuse_together(prepare))[0]
            if first_step is not None:
                device = checked.cluster.device.kind
                job = RunJob.of(options, out_dir, steps=iterations, first_step=first_step, device=device)
                RankRun(checked, job, prepare_rank(checked, job, rank)).execute()
            return load_report(out_dir / "run.json")
