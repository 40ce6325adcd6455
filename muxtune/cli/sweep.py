"""``sweep``: many plans, one table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from muxtune.api.costs import find_costs
from muxtune.cli.options import JsonFlag, ProfilePath
from muxtune.cli.output import check_writable, emit
from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.user_files import read_user_bytes
from muxtune.tasks import Workload


@dataclass(frozen=True, slots=True)
class FoundCosts:
    """Costs as every command finds them; travels to worker processes."""

    profile: Path | None

    def __call__(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
        """Costs of the profile, or of the cluster's device."""
        return find_costs(self.profile, workload, model, cluster)

    def prepare(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> None:
        """Measure this machine's CPU now if that is still to do; workers would measure it all at once."""
        if self.profile is None and cluster.device.kind == "cpu":
            self(workload, model, cluster)


def sweep(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file (YAML).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Where the rows go (Parquet).", show_default=False)],
    profile: ProfilePath = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
    backend: Annotated[
        Literal["loky", "ray"], typer.Option(help="This machine, or the Ray cluster of RAY_ADDRESS.")
    ] = "loky",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that are finished.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Plan every point of a grid or list; one row of a Parquet file for each."""
    check_writable(out, "--out", inputs=[sweep, profile])
    from experiments.sweep import run_sweep, summary_text

    with stdout_kept_clean():
        summary = run_sweep(
            sweep,
            out,
            source=FoundCosts(profile),
            costs_digest=_digest(profile),
            jobs=jobs,
            backend=backend,
            resume=resume,
            progress=True,
        )
    emit(summary, summary_text(summary), as_json=as_json)


def _digest(profile: Path | None) -> str:
    if profile is None:
        return ""
    return hashlib.sha256(read_user_bytes(profile, "the profile")).hexdigest()
