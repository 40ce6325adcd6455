"""The calls of the front door: what to do, with which inputs, and a result that shows itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from muxtune.api.costs import find_costs
from muxtune.api.inputs import PlanInputs, check_inputs
from muxtune.api.results import Compared, Executed, Planned, Profiled, Simulated, Swept, Validated
from muxtune.api.sweep_costs import FoundCosts, profile_digest
from muxtune.cluster import ClusterSpec
from muxtune.cluster import load_cluster as _load_cluster
from muxtune.costs.base import CostModel
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.plan import Plan
from muxtune.plan import load_plan as _load_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload, workload_from
from muxtune.tasks import load_workload as _load_workload

if TYPE_CHECKING:
    from muxtune.planning.problem.problem import PlanningProblem
    from muxtune.policies import Policy

AnyPath = str | os.PathLike[str]

AnyWorkload = AnyPath | Mapping[str, Any] | Workload
"""A workload file, its content, or the workload."""

_NOT_COMPARED = {"exhaustive"}
"""Left out of a comparison unless it is asked for: it proves what others find, and takes its time."""


def load_workload(workload: AnyWorkload) -> Workload:
    """A workload from its file or its content; relative paths in content are taken from the current folder.

    Raises:
        UserError: The file is missing, not YAML, or a field is wrong; the message names it.
    """
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, Mapping):
        return workload_from(dict(workload), "workload", Path.cwd())
    return _load_workload(Path(workload))


def load_model(model: AnyPath | ModelSpec, dtype: Dtype | None = None) -> ModelSpec:
    """A backbone: a preset's name, or a Hugging Face directory.

    Args:
        model: Name or directory; a backbone is handed back as it is.
        dtype: Type of weights and activations; a preset's own by default, float32 for a directory.

    Raises:
        UserError: There is no such backbone, or it is one that is not executed.
    """
    return model if isinstance(model, ModelSpec) else load_model_spec(os.fspath(model), dtype)


def load_cluster(cluster: AnyPath | ClusterSpec) -> ClusterSpec:
    """A cluster: ``cpu-N``, ``testbed-a``, ``-b`` or ``-c``, ``a100-N``, or a YAML file.

    Raises:
        UserError: There is no such cluster, or a field of the file is wrong.
    """
    return cluster if isinstance(cluster, ClusterSpec) else _load_cluster(os.fspath(cluster))


def load_plan(plan: AnyPath | Plan | Planned) -> Planned:
    """A plan from its file.

    Raises:
        UserError: It cannot be read, or its parts do not belong together.
    """
    if isinstance(plan, Planned):
        return plan
    return Planned(plan if isinstance(plan, Plan) else _load_plan(Path(plan)))


def plan(
    workload: AnyWorkload,
    *,
    model: AnyPath | ModelSpec | None = None,
    cluster: AnyPath | ClusterSpec = "cpu-2",
    costs: AnyPath | CostModel | None = None,
    policy: str | Policy = "muxtune",
    options: PlanOptions | None = None,
) -> Planned:
    """The best plan of a policy.

    Args:
        workload: Workload file, its content as a mapping, or the workload.
        model: Preset, Hugging Face directory or backbone; the workload's by default.
        cluster: Name, YAML file or cluster.
        costs: A profile's file, or any cost model; by default as on the command line: a GPU's coefficients
            that ship, or this machine's kept measurements.
        policy: Name, ``file.py:Class``, or an object that is a policy.
        options: Decisions that are not left to the search.

    Raises:
        UserError: Something is missing or wrong, or nothing fits the cluster.
    """
    from sim import search_problem

    problem = _problem(workload, model, cluster, costs)
    return Planned(search_problem(problem, policy=policy, options=options))


def simulate(
    plan: AnyPath | Plan | Planned,
    *,
    operators: bool = False,
    profile: AnyPath | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Simulated:
    """Timeline, memory and throughput that are predicted for a plan.

    Args:
        plan: A plan or its file.
        operators: Play every operator, with the costs that the plan was made with.
        profile: File of these costs, where they were measured; this machine's kept ones by default.
        noise: Spread of operators (of the logarithm); with ``operators``.
        seed: Seed of the noise.

    Raises:
        UserError: The plan is wrong, or its costs are not there.
    """
    from sim import plan_costs, simulate_operators, simulate_plan

    content = load_plan(plan).plan
    if not operators:
        if noise:
            raise SpecError("noise", noise, "operators=True beside it")
        return Simulated(content, simulate_plan(content))
    from muxtune.api.costs import kept_profile

    path = kept_profile(content.model, content.cluster) if profile is None else Path(profile)
    costs = plan_costs(content, path)
    return Simulated(content, simulate_operators(content, costs, seed=seed, noise=noise, record=True))


def run(
    plan: AnyPath | Plan | Planned,
    out: AnyPath,
    *,
    steps: int | None = None,
    resume: bool = False,
    strict: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
    progress: bool = False,
) -> Executed:
    """Execute a plan with torch, on ranks that are started here.

    Args:
        plan: A plan or its file.
        out: Folder of the run; new or empty, unless the run is resumed.
        steps: Optimizer steps per task; all by default.
        resume: Go on from the folder's checkpoints.
        strict: End the run if a task fails; else the others go on, and the report says so.
        device: Compute on these instead of what the plan is for.
        progress: Show a bar on stderr.

    Raises:
        UserError: Something about the plan, the data or the folder is wrong.
        RunError: A rank failed; the newest checkpoints are kept.
    """
    from runtime import RunOptions, run_plan

    content = load_plan(plan).plan
    options = RunOptions(steps=steps, resume=resume, strict=strict, device=device, progress=progress)
    return Executed(content, Path(out), run_plan(content, Path(out), options))


def validate(
    executed: Executed | AnyPath,
    plan: AnyPath | Plan | Planned | None = None,
    *,
    solo_steps: int | None = None,
) -> Validated:
    """A run beside its prediction, and every task beside the same task trained alone.

    Args:
        executed: What :func:`run` returned, or the folder of a run.
        plan: The plan that was run; by default the one in the folder.
        solo_steps: Steps of each task's solo run; as many as the run did by default, 0 for none.

    Raises:
        UserError: The run is not finished, or one of another plan.
    """
    from runtime import validate_run

    run_dir = executed.run_dir if isinstance(executed, Executed) else Path(executed)
    if plan is None:
        plan = executed.plan if isinstance(executed, Executed) else run_dir / "plan.json"
    content = load_plan(plan).plan
    return Validated(content, run_dir, validate_run(content, run_dir, solo_steps=solo_steps))


def compare(
    workload: AnyWorkload,
    *,
    model: AnyPath | ModelSpec | None = None,
    cluster: AnyPath | ClusterSpec = "cpu-2",
    costs: AnyPath | CostModel | None = None,
    policies: Sequence[str | Policy] | None = None,
    measure_dir: AnyPath | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> Compared:
    """All policies on one workload.

    Args:
        workload: As for :func:`plan`.
        model: As for :func:`plan`.
        cluster: As for :func:`plan`.
        costs: As for :func:`plan`.
        policies: Names or objects; by default all but ``exhaustive``.
        measure_dir: Also run every plan for real, each into a folder of its policy's name in here.
        steps: Optimizer steps of each run; all by default.
        progress: Show a bar on stderr for each run.

    Raises:
        UserError: Something is missing or wrong, or no policy has a plan.
    """
    from experiments.comparison import run_comparison

    problem = _problem(workload, model, cluster, costs)
    comparison = run_comparison(
        problem,
        compared_policies() if policies is None else policies,
        measure_dir=None if measure_dir is None else Path(measure_dir),
        steps=steps,
        progress=progress,
    )
    title = f"{len(problem.tasks)} tasks on {problem.model.name}, {problem.cluster.name}"
    return Compared(comparison, title)


def compared_policies() -> list[str]:
    """Names of the policies that are compared where none are named; also of those that cannot be used."""
    from muxtune.policies import POLICIES

    known = {*POLICIES.names(), *(fault.name for fault in POLICIES.faults())}
    return sorted(known - _NOT_COMPARED)


def sweep(
    specification: AnyPath,
    out: AnyPath,
    *,
    costs: AnyPath | None = None,
    jobs: int | None = None,
    backend: Literal["loky", "ray"] = "loky",
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Swept:
    """Plan every point of a sweep file; one row of a Parquet file for each.

    Args:
        specification: Sweep file (YAML).
        out: Parquet file.
        costs: A profile's file; by default as for :func:`plan`.
        jobs: Processes; all cores by default.
        backend: This machine, or the Ray cluster of ``RAY_ADDRESS``.
        resume: Keep the points that are finished.
        force: Replace the sweep that ``out`` has.
        progress: Show a bar on stderr.

    Raises:
        UserError: Something in the file is wrong, or an interrupted sweep would be lost.
        RunError: A worker died; what is finished is kept.
    """
    from experiments.sweep import run_sweep

    profile = None if costs is None else Path(costs)
    summary = run_sweep(
        Path(specification),
        Path(out),
        source=FoundCosts(profile),
        costs_digest=profile_digest(profile),
        jobs=jobs,
        backend=backend,
        resume=resume,
        force=force,
        progress=progress,
    )
    return Swept(summary)


def profile(
    model: AnyPath | ModelSpec,
    out: AnyPath | None = None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Dtype | None = None,
    ranks: int | None = None,
    quick: bool = False,
    progress: bool = False,
) -> Profiled:
    """Measure what the operators of a backbone cost on this machine.

    Args:
        model: Preset, Hugging Face directory or backbone.
        out: Parquet file to write, if it is to be kept.
        device: Device to measure.
        dtype: Type of weights and activations.
        ranks: Processes that measure at once.
        quick: A coarser grid, in a third of the time.
        progress: Show a bar on stderr.

    Raises:
        UserError: No such backbone or device, or a place that cannot be written.
        RunError: A measuring process failed.
    """
    from profiler import profile_model

    spec = load_model(model, dtype)
    path = None if out is None else Path(out)
    measured = profile_model(spec, device=device, out=path, ranks=ranks, quick=quick, progress=progress)
    return Profiled(spec, measured)


def _problem(
    workload: AnyWorkload,
    model: AnyPath | ModelSpec | None,
    cluster: AnyPath | ClusterSpec,
    costs: AnyPath | CostModel | None,
) -> PlanningProblem:
    from muxtune.planning.problem.problem import PlanningProblem

    loaded = load_workload(workload)
    named = model or loaded.backbone
    if named is None:
        raise SpecError("model", None, "a preset or Hugging Face directory, or a backbone in the workload")
    inputs = check_inputs(PlanInputs(loaded, load_model(named, loaded.dtype), load_cluster(cluster)))
    return PlanningProblem(inputs.workload, inputs.model, inputs.cluster, _costs(costs, inputs))


def _costs(costs: AnyPath | CostModel | None, inputs: PlanInputs) -> CostModel:
    if costs is None or isinstance(costs, str | os.PathLike):
        path = None if costs is None else Path(costs)
        return find_costs(path, inputs.workload, inputs.model, inputs.cluster)
    return costs
