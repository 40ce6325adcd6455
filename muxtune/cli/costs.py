"""Where a command gets its operator costs: a profile that it names, a GPU's coefficients, this machine."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from pathlib import Path

import typer

from muxtune.cache import cache_folder
from muxtune.cli.output import stdout_kept_clean
from muxtune.cluster import ClusterSpec
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.devices import device_names
from muxtune.costs.profile import load_profile
from muxtune.costs.profiled import ProfiledCosts
from muxtune.dataset import load_task_data
from muxtune.errors import SpecError
from muxtune.model import ModelSpec
from muxtune.workload import Workload


def find_costs(profile: Path | None, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """Costs of the cluster's device for this backbone.

    Without ``profile``, a GPU is priced by the coefficients that ship for it. A CPU is this machine's, and is
    measured once per backbone, dtype and number of ranks; the profile is kept in
    ``~/.cache/muxtune/profiles`` (``MUXTUNE_CACHE`` replaces ``~/.cache/muxtune``).

    Raises:
        UserError: The profile cannot be read or is of another backbone, there are neither coefficients nor a
            profile of a GPU, or a dataset is wrong (checked before minutes of measuring).
    """
    if profile is not None:
        return ProfiledCosts(load_profile(profile), model)
    if cluster.device.kind != "cpu":
        return _coefficient_costs(model, cluster)
    kept = kept_profile_path(model, cluster)
    if not kept.exists():
        for task in workload.tasks:
            load_task_data(task, model)
        typer.echo(f"muxtune: no profile of {model.name} yet; measuring this machine into {kept}", err=True)
        measure_profile(model, cluster, kept)
    return ProfiledCosts(load_profile(kept), model)


def _coefficient_costs(model: ModelSpec, cluster: ClusterSpec) -> AnalyticCosts:
    device = cluster.device.name
    if device not in device_names():
        known = ", ".join(device_names())
        raise SpecError("--profile", None, f"a profile of {device}; coefficients ship for {known} only")
    costs = AnalyticCosts(device, model, interconnect_of(cluster))
    if model.dtype == "float32":
        warnings.warn(
            f"{model.name} in float32 leaves the tensor cores of {device} idle; "
            "dtype: bfloat16 in the workload uses them",
            stacklevel=2,
        )
    return costs


def kept_profile_path(model: ModelSpec, cluster: ClusterSpec) -> Path:
    """Where the profile of this machine for that backbone and number of ranks is kept."""
    machine = f"{platform.node()} {platform.machine()} {os.cpu_count()} {_cpu_model()}"
    shapes = model.model_dump_json(exclude={"name", "source", "init_seed"})  # costs depend on nothing else
    digest = hashlib.sha256(f"{shapes} {machine}".encode()).hexdigest()[:16]
    return cache_folder() / "profiles" / f"{model.name}-{model.dtype}-{cluster.ranks}-{digest}.parquet"


def kept_profile(model: ModelSpec, cluster: ClusterSpec) -> Path | None:
    """The kept profile of this machine, where there is one."""
    path = kept_profile_path(model, cluster)
    return path if cluster.device.kind == "cpu" and path.exists() else None


def measure_profile(model: ModelSpec, cluster: ClusterSpec, out: Path) -> None:
    """Measure this machine's CPU under the load of as many ranks as the cluster has."""
    from profiler import profile_model

    with stdout_kept_clean():
        profile_model(model, device="cpu", out=out, ranks=cluster.ranks, progress=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
