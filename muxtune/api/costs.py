"""Where a command gets its operator costs: a profile that it names, a GPU's coefficients, this machine."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence, Set
from pathlib import Path

from muxtune.cluster import ClusterSpec
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.applicability import check_profile
from muxtune.costs.base import CostModel
from muxtune.costs.collectives import interconnect_of
from muxtune.costs.devices import device_names
from muxtune.costs.estimated import EstimatedCosts, Source, nearest_profile
from muxtune.costs.kept import kept_profile_path, kept_profiles
from muxtune.costs.needs import PLAIN_KINDS, methods_with, needed_kinds
from muxtune.costs.profile import Profile, load_profile
from muxtune.costs.profiled import ProfiledCosts
from muxtune.model import ModelSpec
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError
from muxtune.support.printable import one_line
from muxtune.tasks import Workload, load_task_data


def find_costs(profile: Path | None, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """Costs of the cluster's device for this backbone.

    Without ``profile``, a GPU is priced by the coefficients that ship for it. A CPU is this machine's:
    ``muxtune profile`` measures it once per backbone, dtype and number of ranks, and keeps the profile in
    ``~/.cache/muxtune/profiles`` (``MUXTUNE_CACHE`` replaces ``~/.cache/muxtune``). What a later workload
    needs beyond it is measured then, and comes to it. Until then costs are estimated, from what was measured
    of a similar backbone, or from a calibration of a few seconds, which is kept as well.

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
    kept = kept_profile_path(model, cluster.ranks)
    former = load_profile(kept) if kept.exists() else None
    lacking = needed - PLAIN_KINDS - (frozenset() if former is None else former.kinds)
    if former is None:
        return _estimated_costs(model, cluster, methods_with(needed))
    if lacking:
        for task in workload.tasks:
            load_task_data(task, model)
        what = f"the profile of {one_line(model.name)} has no {', '.join(sorted(lacking))} yet"
        sys.stderr.write(f"muxtune: {what}; measuring this machine into {kept}\n")
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
        names = ",".join(methods_with(lacking))
        adds = f"muxtune profile --out {shlex.quote(str(path))} --methods {names}"
        expected = f"a profile with {', '.join(lacking)}, which tasks need: {adds} adds what is missing"
        raise SpecError("--profile", str(path), expected)


def _estimated_costs(model: ModelSpec, cluster: ClusterSpec, methods: Sequence[str]) -> EstimatedCosts:
    better = profile_command(model, cluster, methods)
    source = nearest_profile(kept_profiles(), model, cluster.ranks)
    origin: Source = "another backbone"
    if source is None:
        origin, source = (
            "calibration",
            kept_profiles() / "calibrations" / kept_profile_path(model, cluster.ranks).name,
        )
        if not source.exists():
            text = f"nothing is measured on this machine that is like {one_line(model.name)}; calibrating"
            sys.stderr.write(f"muxtune: {text} for a few seconds\n")
            from profiler.calibration import calibrate

            with stdout_kept_clean():
                calibrate(model, ranks=cluster.ranks, out=source)
    costs = EstimatedCosts(load_profile(source), model, origin, better)
    warnings.warn(f"costs of {one_line(model.name)} are {costs.sentence}", stacklevel=2)
    return costs


def profile_command(model: ModelSpec, cluster: ClusterSpec, methods: Sequence[str]) -> str:
    """The command that measures a backbone on this machine for ``muxtune plan``.

    Args:
        model: The backbone.
        cluster: Where it is planned for.
        methods: Names of the PEFT methods that its tasks have beside plain LoRA.
    """
    name = model.name if model.source == "preset" else model.source
    words = ["muxtune", "profile", "--model", name, "--dtype", model.dtype]
    if cluster.ranks != DEFAULT_RANKS:
        words += ["--ranks", str(cluster.ranks)]
    if methods:
        words += ["--methods", ",".join(methods)]
    return shlex.join(words)


DEFAULT_RANKS = 2
"""Ranks of the cluster that is planned for by default."""


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


def kept_profile(model: ModelSpec, cluster: ClusterSpec) -> Path | None:
    """The kept profile of this machine, where there is one."""
    path = kept_profile_path(model, cluster.ranks)
    return path if cluster.device.kind == "cpu" and path.exists() else None


def measure_profile(model: ModelSpec, cluster: ClusterSpec, out: Path, *, kinds: Set[str]) -> None:
    """Measure what a profile lacks on this machine's CPU, loaded by as many ranks as the cluster has."""
    from profiler import profile_model

    with stdout_kept_clean():
        profile_model(model, device="cpu", out=out, ranks=cluster.ranks, kinds=kinds, progress=True)
