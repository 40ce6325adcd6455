"""Where a command gets its operator costs: a profile that it names, a GPU's coefficients, this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from pathlib import Path

from muxtune.cluster import ClusterSpec
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.applicability import KERNELS_VARIABLE, check_profile
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.devices import device_names
from muxtune.costs.profile import PROFILE_FORMAT, load_profile
from muxtune.costs.profiled import ProfiledCosts
from muxtune.model import ModelSpec
from muxtune.support.cache import cache_folder
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError
from muxtune.support.files import file_name
from muxtune.support.machine import package_version, processor_name, usable_cores
from muxtune.support.printable import one_line
from muxtune.tasks import Workload, load_task_data


def find_costs(profile: Path | None, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """Costs of the cluster's device for this backbone.

    Without ``profile``, a GPU is priced by the coefficients that ship for it. A CPU is this machine's, and is
    measured once per backbone, dtype and number of ranks; the profile is kept in
    ``~/.cache/muxtune/profiles`` (``MUXTUNE_CACHE`` replaces ``~/.cache/muxtune``).

    Raises:
        UserError: The profile cannot be read or is of another backbone or device, there are neither
            coefficients nor a profile of a GPU, or a dataset is wrong (checked before minutes of measuring).
    """
    if profile is not None:
        return _profiled_costs(profile, model, cluster)
    if cluster.device.kind != "cpu":
        return _coefficient_costs(model, cluster)
    kept = kept_profile_path(model, cluster)
    if not kept.exists():
        for task in workload.tasks:
            load_task_data(task, model)
        text = f"no profile of {one_line(model.name)} yet; measuring this machine into {kept}"
        sys.stderr.write(f"muxtune: {text}\n")
        measure_profile(model, cluster, kept)
    return _profiled_costs(kept, model, cluster)


def _profiled_costs(path: Path, model: ModelSpec, cluster: ClusterSpec) -> ProfiledCosts:
    profile = load_profile(path)
    doubts = check_profile(profile, cluster, str(path))
    for doubt in doubts:
        warnings.warn(f"{path}: {doubt}", stacklevel=2)
    return ProfiledCosts(profile, model, doubts)


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
    """Where the profile of this machine for that backbone and number of ranks is kept.

    The name has a digest of all that changes what an operator takes: shapes and dtype, the machine and the
    cores that processes have on it, versions, and the settings of kernels.
    """
    machine = [platform.node(), platform.machine(), processor_name(), usable_cores(), platform.release()]
    versions = [platform.python_version(), *map(package_version, ("torch", "numpy", "muxtune"))]
    settings = [os.environ.get(name, "") for name in _SPEED_VARIABLES]
    shapes = model.model_dump_json(exclude={"name", "source", "init_seed"})  # costs depend on nothing else
    key = json.dumps([PROFILE_FORMAT, shapes, cluster.ranks, machine, versions, settings])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return (
        cache_folder()
        / "profiles"
        / f"{file_name(model.name)}-{model.dtype}-{cluster.ranks}-{digest}.parquet"
    )


_SPEED_VARIABLES = (
    KERNELS_VARIABLE,
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
    *("MALLOC_ARENA_MAX", "LD_PRELOAD"),
)
"""Environment variables that decide which kernels, instructions and allocator operators run with."""


def kept_profile(model: ModelSpec, cluster: ClusterSpec) -> Path | None:
    """The kept profile of this machine, where there is one."""
    path = kept_profile_path(model, cluster)
    return path if cluster.device.kind == "cpu" and path.exists() else None


def measure_profile(model: ModelSpec, cluster: ClusterSpec, out: Path) -> None:
    """Measure this machine's CPU under the load of as many ranks as the cluster has."""
    from profiler import profile_model

    with stdout_kept_clean():
        profile_model(model, device="cpu", out=out, ranks=cluster.ranks, progress=True)
