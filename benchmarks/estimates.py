"""How far are iteration times by estimated costs from those by a whole profile?

Profiles several backbones on this machine, and calibrates each for a few seconds. For every backbone, random
workloads are planned with its own profile, and the same plans are priced with estimates: from the profile
that `muxtune plan` would take among the others, and from the calibration. The profile is the measure, not
a run: `benchmarks.accuracy` says how far that is from one.

    python -m benchmarks.estimates [--workloads 4] [--ranks 2] [--quick] [--keep FOLDER] [--write]

With `--write` the errors become those that a plan with estimated costs prints.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import muxtune.data
from benchmarks.helpers.machine import machine_line
from experiments.workloads import random_workload
from muxtune.cluster import load_cluster
from muxtune.costs import ProfiledCosts, load_profile
from muxtune.costs.estimated import (
    ERRORS_FILE,
    EstimatedCosts,
    EstimateError,
    EstimateErrors,
    Source,
    nearest_profile,
    save_errors,
)
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.model import PRESETS, ModelSpec
from muxtune.operators import COLLECTIVE_KINDS
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.tasks import Workload
from profiler import profile_model
from profiler.calibration import calibrate
from sim import price_decisions, search_problem

_WIDER = {"name": "llama-384", "hidden": 384, "ffn": 1024, "heads": 6, "kv_heads": 6, "head_dim": 64}
_NARROWER = {"name": "llama-128", "hidden": 128, "ffn": 352, "heads": 4, "kv_heads": 2, "head_dim": 32}

BACKBONES: tuple[ModelSpec, ...] = (
    PRESETS["llama-tiny"],
    PRESETS["gpt2-tiny"],
    PRESETS["opt-tiny"],
    PRESETS["llama-tiny"].model_copy(update=_WIDER),
    PRESETS["llama-tiny"].model_copy(update=_NARROWER),
)
"""All families, and widths from 128 to 384."""

_PLANS: tuple[tuple[str, PlanOptions], ...] = (
    ("muxtune", PlanOptions()),
    ("sl-peft", PlanOptions(pp=1)),
    ("nemo", PlanOptions()),
    ("muxtune", PlanOptions(template="flush")),
)
"""Policies that take turns."""


@dataclass(frozen=True, slots=True)
class Case:
    """One backbone, workload and kind of estimate."""

    backbone: str
    workload: int
    source: Source
    of: str
    """Backbone that was measured."""
    error: float
    """Estimated over profiled iteration time, less 1."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", type=int, default=4, help="per backbone")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="coarser profiles, in a third of the time")
    parser.add_argument(
        "--keep", type=Path, help="folder of profiles, which are measured where they are missing"
    )
    parser.add_argument("--write", action="store_true", help="ship the errors")
    chosen = parser.parse_args(arguments)
    print(f"machine: {machine_line()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        measure(folder, chosen.ranks, quick=chosen.quick)
        cases = []
        for case in compare(folder, chosen.ranks, chosen.workloads):
            cases.append(case)
            print(
                f"{case.backbone:12} workload {case.workload}, {case.source} ({case.of}): {case.error:+.1%}",
                flush=True,
            )
    errors = summary(cases)
    for source, error in errors.items():
        print(f"{source}: mean error {error.mean:.1%}, largest {error.largest:.1%}, {error.cases} cases")
    if chosen.write:
        options = f" --workloads {chosen.workloads} --ranks {chosen.ranks}" + " --quick" * chosen.quick
        found = EstimateErrors(
            machine=machine_line(),
            date=datetime.now(UTC).date().isoformat(),
            command=f"python -m benchmarks.estimates{options}",
            backbones=tuple(model.name for model in BACKBONES),
            errors=errors,
        )
        save_errors(found, Path(muxtune.data.__file__).parent / ERRORS_FILE)


def measure(folder: Path, ranks: int, *, quick: bool) -> None:
    """Profile and calibrate every backbone that is not there."""
    for model in BACKBONES:
        for path, calibrates in ((_profile(folder, model), False), (_calibration(folder, model), True)):
            if calibrates and path.exists():
                continue  # what a profile has is not measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            if calibrates:
                calibrate(model, ranks=ranks, out=path)
            else:
                # One rank alone is in no collective; a search prices messages nevertheless.
                kinds = PLAIN_KINDS if ranks > 1 else PLAIN_KINDS - COLLECTIVE_KINDS
                profile_model(model, ranks=ranks, out=path, quick=quick, kinds=kinds, progress=True)


def compare(folder: Path, ranks: int, workloads: int) -> Iterator[Case]:
    """Every backbone, workload and kind of estimate."""
    cluster = load_cluster(f"cpu-{ranks}")
    for model in BACKBONES:
        own = ProfiledCosts(load_profile(_profile(folder, model)), model)
        estimates = _estimates(folder, model, ranks)
        for number in range(workloads):
            policy, options = _PLANS[number % len(_PLANS)]
            workload = _fitted(random_workload(number, tasks=4), model)
            with own.exploring():
                plan = search_problem(
                    PlanningProblem(workload, model, cluster, own), policy=policy, options=options
                )
            for costs in estimates:
                problem = PlanningProblem(workload, model, cluster, costs)
                decisions = plan.decisions.model_copy(update={"costs": None})
                priced = price_decisions(problem, decisions)
                error = priced.predicted.iteration_s / plan.predicted.iteration_s - 1
                yield Case(model.name, number, costs.origin, costs.profile.model.name, error)


def summary(cases: Sequence[Case]) -> dict[Source, EstimateError]:
    """Mean and largest error of each kind of estimate."""
    sources: dict[Source, list[float]] = {}
    for case in cases:
        sources.setdefault(case.source, []).append(abs(case.error))
    return {
        source: EstimateError(mean=sum(errors) / len(errors), largest=max(errors), cases=len(errors))
        for source, errors in sources.items()
    }


def _estimates(folder: Path, model: ModelSpec, ranks: int) -> list[EstimatedCosts]:
    with tempfile.TemporaryDirectory() as name:
        others = Path(name)
        for other in BACKBONES:
            if other != model:
                (others / f"{other.name}.parquet").symlink_to(_profile(folder, other).resolve())
        nearest = nearest_profile(others, model, ranks)
        assert nearest is not None, "the backbones are like one another"
        profiles: list[tuple[Path, Source]] = [
            (nearest, "another backbone"),
            (_calibration(folder, model), "calibration"),
        ]
        return [EstimatedCosts(load_profile(path), model, source, "") for path, source in profiles]


def _fitted(workload: Workload, model: ModelSpec) -> Workload:
    """The workload with targets that the backbone has."""
    if model.family == "llama":
        return workload
    tasks = [
        task.model_copy(update={"peft": task.peft.model_copy(update={"targets": ("all-linear",)})})
        for task in workload.tasks
    ]
    return workload.model_copy(update={"tasks": tuple(tasks)})


def _profile(folder: Path, model: ModelSpec) -> Path:
    return folder / f"{model.name}.parquet"


def _calibration(folder: Path, model: ModelSpec) -> Path:
    return folder / "calibrations" / f"{model.name}.parquet"


if __name__ == "__main__":
    main()
