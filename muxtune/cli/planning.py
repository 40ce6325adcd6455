"""``plan`` and ``simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from muxtune.alignment import Alignment
from muxtune.cli.costs import find_costs
from muxtune.cli.inputs import load_inputs
from muxtune.cli.options import (
    DEFAULT_CLUSTER,
    ClusterName,
    GanttPath,
    JsonFlag,
    ModelName,
    PlanPath,
    ProfilePath,
    WorkloadPath,
)
from muxtune.cli.output import check_writable, emit, stdout_kept_clean
from muxtune.cli.summary import plan_summary, predicted_table
from muxtune.plan import Plan, load_plan, save_plan
from muxtune.schedule import Template
from muxtune.trace import save_trace


def _print_schema(wanted: bool) -> None:
    if wanted:
        typer.echo(json.dumps(Plan.model_json_schema(), indent=2))
        raise typer.Exit


def plan(  # noqa: PLR0913, PLR0917  # an argument per option
    workload: WorkloadPath,
    model: ModelName = None,
    cluster: ClusterName = DEFAULT_CLUSTER,
    profile: ProfilePath = None,
    policy: Annotated[str, typer.Option(help="See `muxtune policies`.")] = "muxtune",
    partition: Annotated[
        str | None, typer.Option(help='Fix the fusion: "a+b,c" makes the hTasks {a, b} and {c}.')
    ] = None,
    alignment: Annotated[Alignment | None, typer.Option(help="Fix the alignment.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, help="Fix the chunk length.")] = None,
    template: Annotated[Template | None, typer.Option(help="Fix the pipeline template.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks that share a stage.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Replicas that share the data.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes.")] = Path("plan.json"),
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print plan.json's JSON Schema."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Search the best plan of a policy for a workload."""
    from muxtune.planning.options import PlanOptions
    from muxtune.policies import POLICIES

    check_writable(out, "--out")
    POLICIES.get(policy)  # before anything is measured
    inputs = load_inputs(workload, model, cluster)
    costs = find_costs(profile, inputs.workload, inputs.model, inputs.cluster)
    options = PlanOptions(
        partition=partition,
        alignment=alignment,
        chunk_tokens=chunk_tokens,
        template=template,
        tp=tp,
        pp=pp,
        dp=dp,
    )
    from sim import search_plan

    with stdout_kept_clean():
        best = search_plan(
            inputs.workload, inputs.model, inputs.cluster, costs, policy=policy, options=options
        )
        summary = "" if as_json else plan_summary(best)
    save_plan(best, out)
    emit(best, f"{summary}\n\nwritten to {out}", as_json=as_json)


def simulate(
    plan: PlanPath,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome/Perfetto trace.", show_default=False)
    ] = None,
    gantt: GanttPath = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict timeline, memory and throughput of a plan."""
    check_writable(trace, "--trace")
    check_writable(gantt, "--gantt")
    loaded = load_plan(plan)
    from sim import simulate_plan

    report = simulate_plan(loaded)
    if trace is not None:
        save_trace(trace, report.spans, "simulated")
    if gantt is not None:
        from experiments.gantt import draw_plan

        draw_plan(loaded, gantt)
    emit(report.predicted, predicted_table(report.predicted), as_json=as_json)
