"""``plan`` and ``simulate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from muxtune.api.costs import find_costs, kept_profile
from muxtune.api.inputs import PlanInputs, load_inputs
from muxtune.api.plan_summary import explanation_table, plan_summary, predicted_table
from muxtune.batches import Alignment
from muxtune.cli.options import (
    DEFAULT_CLUSTER,
    ClusterName,
    GanttPath,
    JsonFlag,
    ModelName,
    PlanPath,
    ProfilePath,
    WideFlag,
    was_given,
)
from muxtune.cli.output import check_writable, emit, for_people, planning_bar, show, written
from muxtune.cli.plan_diff import diff
from muxtune.orchestration import Mode
from muxtune.plan import Plan, load_plan, save_plan
from muxtune.planning.decisions.options import PlanOptions, parse_partition
from muxtune.schedule import Template
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.errors import SpecError


def _print_schema(wanted: bool) -> None:
    if wanted:
        show(json.dumps(Plan.model_json_schema(), indent=2))
        raise typer.Exit


plan_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
plan_app.command()(diff)


@plan_app.callback()
def plan(  # noqa: PLR0913, PLR0917  # an argument per option
    context: typer.Context,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Workload file (YAML).", show_default=False)
    ] = None,
    model: ModelName = None,
    cluster: ClusterName = DEFAULT_CLUSTER,
    profile: ProfilePath = None,
    policy: Annotated[str, typer.Option(help="A name of `muxtune policies`, or FILE.py:CLASS.")] = "muxtune",
    partition: Annotated[
        str | None, typer.Option(help='Fix the fusion: "a+b,c" makes the hTasks {a, b} and {c}.')
    ] = None,
    alignment: Annotated[Alignment | None, typer.Option(help="Fix the alignment.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, help="Fix the chunk length.")] = None,
    carry: Annotated[
        int | None,
        typer.Option(min=1, help="Fix over how many micro-batches sequences are cut; 1 for none."),
    ] = None,
    template: Annotated[Template | None, typer.Option(help="Fix the pipeline template.")] = None,
    orchestration: Annotated[
        Mode | None,
        typer.Option(
            help="Fix how hTasks share a stage: sequential (nothing overlaps), intra (each overlaps by "
            "itself), round-robin (subgraphs take turns) or interleaved (list scheduling)."
        ),
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Ranks that share a stage.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Replicas that share the data.")] = None,
    no_fusion: Annotated[bool, typer.Option("--no-fusion", help="muxtune without batching tasks.")] = False,
    no_orchestration: Annotated[
        bool, typer.Option("--no-orchestration", help="muxtune without overlap inside a stage.")
    ] = False,
    no_chunking: Annotated[bool, typer.Option("--no-chunking", help="muxtune with padded rows.")] = False,
    decisions: Annotated[
        Path | None,
        typer.Option(
            "--decisions", help="Instead of a search: the decisions of a YAML file.", show_default=False
        ),
    ] = None,
    reprice: Annotated[
        Path | None,
        typer.Option(
            "--reprice",
            metavar="PLAN",
            help="Instead of a search: the decisions of an edited plan, which is replaced without --out.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What is made small: the time of an `iteration`, the peak `memory` of the fullest rank, the "
            "`makespan` of all tasks, the seconds per own token of the `slowest-tenant`, or FILE.py:FUNCTION."
        ),
    ] = "iteration",
    policy_option: Annotated[
        list[str] | None,
        typer.Option(
            "--policy-option",
            metavar="KEY=VALUE",
            help="An option of the policy's own; may be given several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes.")] = Path("plan.json"),
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print plan.json's JSON Schema."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what the runners-up lose, and on what.")
    ] = False,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Search the best plan of a policy for a workload, or price decisions that are given."""
    if context.invoked_subcommand is not None:
        if any(was_given(context, name) for name in context.params):
            context.fail(f"The options of plan do not go with {context.invoked_subcommand}.")
        return
    if decisions is not None or reprice is not None:
        _plan_decided(context, decisions, reprice, profile, out, wide=wide, as_json=as_json)
        return
    if workload is None:
        raise SpecError("--workload", None, "a workload file (or --decisions, or --reprice)")
    from muxtune.planning.decisions.options import PlanOptions, Switchable
    from muxtune.planning.problem.objectives import find_objective
    from muxtune.planning.problem.problem import PlanningProblem
    from muxtune.policies import choose_policy, explain_muxtune

    check_writable(out, "--out", inputs=[workload, cluster, profile])
    chosen = choose_policy(policy)
    own_options = chosen.check_options(_by_key(policy_option or []))  # before all measuring
    find_objective(objective)
    if explain and policy != "muxtune":
        raise SpecError("--explain", policy, "policy muxtune: the others search no partitions")
    inputs = load_inputs(workload, model, cluster)
    check_writable(out, "--out", inputs=[task.dataset.path for task in inputs.workload.tasks])
    switches: dict[Switchable, bool] = {
        "fusion": no_fusion,
        "orchestration": no_orchestration,
        "chunking": no_chunking,
    }
    options = PlanOptions(
        partition=partition,
        alignment=alignment,
        chunk_tokens=chunk_tokens,
        carry=carry,
        template=template,
        orchestration=orchestration,
        tp=tp,
        pp=pp,
        dp=dp,
        without=tuple(part for part, off in switches.items() if off),
        objective=objective,
        policy_options=own_options,
    )
    _check_possible(inputs, options, ours=chosen.ours)
    costs = find_costs(profile, inputs.workload, inputs.model, inputs.cluster)
    from sim import search_problem

    with stdout_kept_clean(), planning_bar() as progress:
        problem = PlanningProblem(inputs.workload, inputs.model, inputs.cluster, costs, progress=progress)
        best = search_problem(problem, policy=policy, options=options)
        explanation = explain_muxtune(problem, options) if explain else None
        summary = "" if as_json else plan_summary(best)
    save_plan(best, out)
    if explanation is None:
        emit(best, summary + written(out), wide=wide, as_json=as_json)
    elif as_json:
        content = {"plan": best.model_dump(mode="json"), "explanation": explanation.as_dict()}
        show(json.dumps(content))
    else:
        text = f"{summary}\n\n{explanation_table(explanation)}{written(out)}"
        show(for_people(text, wide=wide))


def _check_possible(inputs: PlanInputs, options: PlanOptions, *, ours: bool) -> None:
    """Refuse a mesh that cannot be before anything is measured; a partition, too, if the policy is ours.

    Another one may have a reason of its own to refuse partitions.
    """
    from muxtune.planning.problem.meshes import candidate_meshes
    from muxtune.policies.finalists import check_ranks

    check_ranks(inputs.cluster, options)
    candidate_meshes(inputs.model, inputs.cluster, options)
    if ours and options.partition is not None:
        parse_partition(options.partition, [task.id for task in inputs.workload.tasks])


_BESIDE_DECISIONS = {"decisions", "reprice", "profile", "out", "wide", "as_json", "schema"}
"""Parameters that say nothing that decisions say."""


def _plan_decided(
    context: typer.Context,
    decisions: Path | None,
    reprice: Path | None,
    profile: Path | None,
    out: Path,
    *,
    wide: bool,
    as_json: bool,
) -> None:
    """Price the decisions of a file."""
    option, path = ("--decisions", decisions) if decisions is not None else ("--reprice", reprice)
    given = {name for name in context.params if was_given(context, name)}
    others = sorted(given - _BESIDE_DECISIONS)
    if others:
        name = f"--{others[0].replace('_', '-')}"
        raise SpecError(name, context.params[others[0]], f"nothing beside {option}: the file decides it")
    if decisions is not None and reprice is not None:
        raise SpecError("--reprice", str(reprice), "nothing beside --decisions")
    assert path is not None
    if decisions is None and "out" not in given:
        out = path  # the rest of an edited plan is made anew
    check_writable(out, "--out", inputs=[decisions, profile])
    from muxtune.api.decided import plan_by_hand, reprice_plan

    with stdout_kept_clean():
        made = plan_by_hand(path, profile) if decisions is not None else reprice_plan(path, profile)
        summary = "" if as_json else plan_summary(made)
    check_writable(out, "--out", inputs=[task.dataset.path for task in made.tasks])
    save_plan(made, out)
    emit(made, summary + written(out), wide=wide, as_json=as_json)


def _by_key(pairs: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SpecError("--policy-option", pair, "KEY=VALUE")
        if key.strip() in values:
            raise SpecError("--policy-option", pair, f"{key.strip()} once")
        values[key.strip()] = value
    return values


def simulate(
    plan: PlanPath,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome/Perfetto trace.", show_default=False)
    ] = None,
    gantt: GanttPath = None,
    operators: Annotated[
        bool,
        typer.Option("--operators", help="Play every operator, with the costs that the plan was made with."),
    ] = False,
    profile: ProfilePath = None,
    noise: Annotated[
        float, typer.Option(min=0, help="Spread of operators (of the logarithm); with --operators.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Predict timeline, memory and throughput of a plan."""
    check_writable(trace, "--trace", inputs=[plan, profile])
    check_writable(gantt, "--gantt", inputs=[plan, profile])
    loaded = load_plan(plan)
    if noise and not operators:
        raise SpecError("--noise", noise, "--operators beside it")
    from sim import plan_costs, simulate_operators, simulate_plan

    if operators:
        costs = plan_costs(loaded, profile or kept_profile(loaded.model, loaded.cluster))
        report = simulate_operators(loaded, costs, seed=seed, noise=noise, record=trace is not None)
    else:
        report = simulate_plan(loaded)
    if trace is not None:
        report.save_trace(trace)
    if gantt is not None:
        from experiments.gantt import draw_plan

        draw_plan(loaded, gantt)
    emit(
        report.predicted,
        predicted_table(report.predicted, loaded) + written(trace, gantt),
        wide=wide,
        as_json=as_json,
    )
