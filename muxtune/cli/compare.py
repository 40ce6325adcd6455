"""``compare``: all policies on one workload."""

from __future__ import annotations

from collections.abc import Sequence
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
    was_given,
)
from muxtune.cli.output import check_writable, emit, written
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError


def compare(  # noqa: PLR0913, PLR0917  # an argument per option
    context: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[PLAN]...", help="With --plans.", show_default=False)
    ] = None,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Workload file (YAML).", show_default=False)
    ] = None,
    plans: Annotated[
        bool, typer.Option("--plans", help="Instead of policies: plans as they are, against the first.")
    ] = False,
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
    """Plan a workload under every policy, or hold plans side by side; one table, and one picture."""
    if plans or files:
        _compare_plans(context, files or [], picture, plans=plans, wide=wide, as_json=as_json)
        return
    if workload is None:
        raise SpecError("--workload", None, "a workload file (or --plans with plan files)")
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
    table = comparison_table(comparison) + written(out if measure else None, picture)
    emit(comparison, table, wide=wide, as_json=as_json)


_BESIDE_PLANS = {"files", "plans", "picture", "wide", "as_json"}


def _compare_plans(
    context: typer.Context,
    files: Sequence[Path],
    picture: Path | None,
    *,
    plans: bool,
    wide: bool,
    as_json: bool,
) -> None:
    if not plans:
        raise SpecError("PLAN", str(files[0]), "--plans before plan files, or no file")
    if len(files) < 2:  # a comparison has two
        raise SpecError("--plans", [str(file) for file in files], "two plan files, or more")
    others = [name for name in context.params if was_given(context, name) and name not in _BESIDE_PLANS]
    if others:
        name = f"--{others[0].replace('_', '-')}"
        raise SpecError(name, context.params[others[0]], "nothing beside --plans: the files have it")
    check_writable(picture, "--picture", inputs=files)
    from experiments.comparison import compare_plan_files, comparison_table
    from experiments.comparison_picture import check_picture, draw_comparison

    if picture is not None:
        check_picture(picture, "--picture")
    comparison = compare_plan_files(files)
    if picture is not None:
        draw_comparison(comparison, picture, title=f"{len(files)} plans")
    emit(comparison, comparison_table(comparison) + written(picture), wide=wide, as_json=as_json)
