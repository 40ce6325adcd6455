"""Where a command gets its operator costs: a profile that it names, a GPU's coefficients, this machine."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Set
from pathlib import Path

from muxtune.cluster import ClusterSpec
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.applicability import check_profile
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.conditions import conditions_digest, machine_digest
from muxtune.costs.devices import device_names
from muxtune.costs.needs import PLAIN_KINDS, methods_with, needed_kinds
from muxtune.costs.profile import Profile, load_profile
from muxtune.costs.profiled import ProfiledCosts
from muxtune.model import ModelSpec
from muxtune.support.cache import cache_folder
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError
from muxtune.support.files import file_name
from muxtune.support.printable import one_line
from muxtune.tasks import Workload, load_task_data


def find_costs(profile: Path | None, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """Costs of the cluster's device for this backbone.

    Without ``profile``, a GPU is priced by the coefficients that ship for it. A CPU is this machine's, and is
    measured once per backbone, dtype and number of ranks; the profile is kept in
    ``~/.cache/muxtune/profiles`` (``MUXTUNE_CACHE`` replaces ``~/.cache/muxtune``). What a later workload
    needs beyond it is measured then, and comes to it.

    Raises:
        UserError: The profile cannot be read or is of another backbone or device, there are neither
            coefficients nor a profile of a GPU, or a dataset is wrong (checked before minutes of measuring).
    """
    needed = needed_kinds((task.peft for task in workload.tasks), model)
    if profile is not None:
        costs = _profiled_costs(profile, model, cluster)
        _refuse_lacking(costs.profile, profile, needed)
        return costs
    if cluster.device.kind != "cpu":
        return _coefficient_costs(model, cluster)
    kept = kept_profile_path(model, cluster)
    former = load_profile(kept) if kept.exists() else None
    lacking = needed - PLAIN_KINDS - (frozenset() if former is None else former.kinds)
    if former is None or lacking:
        for task in workload.tasks:
            load_task_data(task, model)
        what = "no profile" if former is None else f"the profile has no {', '.join(sorted(lacking))}"
        text = f"{what} of {one_line(model.name)} yet; measuring this machine into {kept}"
        sys.stderr.write(f"muxtune: {text}\n")
        measure_profile(model, cluster, kept, kinds=needed)
    return _profiled_costs(kept, model, cluster)


def _profiled_costs(path: Path, model: ModelSpec, cluster: ClusterSpec) -> ProfiledCosts:
    profile = load_profile(path)
    doubts = check_profile(profile, cluster, str(path))
    for doubt in doubts:
        warnings.warn(f"{path}: {doubt}", stacklevel=2)
    return ProfiledCosts(profile, model, doubts)


def _refuse_lacking(profile: Profile, path: Path, needed: Set[str]) -> None:
    """Refuse a profile without the operators of the tasks' methods, and say what adds them."""
    lacking = sorted(needed - PLAIN_KINDS - profile.kinds)
    if lacking:
        adds = f"muxtune profile --out {shlex.quote(str(path))} --methods {','.join(methods_with(lacking))}"
        expected = f"a profile with {', '.join(lacking)}, which tasks need: {adds} adds what is missing"
        raise SpecError("--profile", str(path), expected)


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
    name = f"{file_name(model.name)}-{model.dtype}-{cluster.ranks}-{conditions_digest(model, cluster.ranks)}"
    return kept_profiles() / f"{name}.parquet"


def kept_profiles() -> Path:
    """Folder of the kept profiles of this machine."""
    return cache_folder() / "profiles" / machine_digest()


def kept_profile(model: ModelSpec, cluster: ClusterSpec) -> Path | None:
    """The kept profile of this machine, where there is one."""
    path = kept_profile_path(model, cluster)
    return path if cluster.device.kind == "cpu" and path.exists() else None


def measure_profile(model: ModelSpec, cluster: ClusterSpec, out: Path, *, kinds: Set[str]) -> None:
    """Measure what a profile lacks on this machine's CPU, loaded by as many ranks as the cluster has."""
    from profiler import profile_model

    with stdout_kept_clean():
        profile_model(model, device="cpu", out=out, ranks=cluster.ranks, kinds=kinds, progress=True)
