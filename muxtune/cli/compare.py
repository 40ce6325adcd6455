"""``compare``: all policies on one workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.api.calls import compared_policies
from muxtune.api.costs import find_costs
from muxtune.api.inputs import load_inputs
from muxtune.cli.options import (
    DEFAULT_CLUSTER,
    ClusterName,
    JsonFlag,
    ModelName,
    ProfilePath,
    WideFlag,
    WorkloadPath,
)
from muxtune.cli.output import check_writable, emit
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError


def compare(  # noqa: PLR0913, PLR0917  # an argument per option
    workload: WorkloadPath,
    model: ModelName = None,
    cluster: ClusterName = DEFAULT_CLUSTER,
    profile: ProfilePath = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Names or FILE.py:CLASS with commas between them; by default all but `exhaustive`."
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also run every plan for real.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the runs, with --measure.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of each run; all by default.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Draw tokens/s and memory (.png, .svg or .pdf).", show_default=False),
    ] = None,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Plan a workload under every policy; one table, and one picture."""
    from muxtune.planning.problem.problem import PlanningProblem
    from muxtune.policies import choose_policy

    if measure and out is None:
        raise SpecError("--out", None, "a folder for the runs that --measure makes")
    check_writable(out, "--out", folder=True)
    check_writable(picture, "--picture", inputs=[workload, cluster, profile])
    if picture is not None:
        from experiments.comparison_picture import check_picture

        check_picture(picture, "--picture")
    if policies is None:
        names = compared_policies()  # what cannot be used is a row that says why
    else:
        names = [name.strip() for name in policies.split(",")]
        for name in names:
            choose_policy(name)  # before anything is measured
    inputs = load_inputs(workload, model, cluster)
    costs = find_costs(profile, inputs.workload, inputs.model, inputs.cluster)
    from experiments.comparison import comparison_table, run_comparison

    with stdout_kept_clean():
        problem = PlanningProblem(inputs.workload, inputs.model, inputs.cluster, costs)
        comparison = run_comparison(
            problem, names, measure_dir=out if measure else None, steps=steps, progress=True
        )
    if picture is not None:
        from experiments.comparison_picture import draw_comparison

        title = f"{len(inputs.workload.tasks)} tasks on {inputs.model.name}, {inputs.cluster.name}"
        draw_comparison(comparison, picture, title=title)
    emit(comparison, comparison_table(comparison), wide=wide, as_json=as_json)
