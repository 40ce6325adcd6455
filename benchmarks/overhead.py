"""How much of an action's time is not computing: Python, dispatch, autograd's bookkeeping?

The mixed tasks of the speed comparison on a Llama 512 wide, as a real run on two ranks (pp=2) and as a real
run of the whole backbone in one process. An action is what a trace shows as one: building the micro-batch's
tensors, the stage, the loss, handing over the message; not the wait for a message. Two methods, per forward
and backward of each hTask on each stage:

narrow  The same plan on a backbone 8 wide executes the same operators on the same tokens with next to no work
        in them. What an action takes there is nearly all overhead, dispatch inside of operators included,
        and the work that is left too; on the other hand Python finds more of its own in the caches, and
        frozen products this small go to MKL instead of oneDNN. Both runs are measured in processor time,
        without a profiler.
beside  Time under torch's profiler, less the self time of the operators that compute or move elements. This
        is Python, functions and engine of autograd, operators that only describe or allocate tensors
        (``descriptions``), and what of the profiler's own cost lies beside the operators. Dispatch inside of
        an operator counts as the operator's here. Less what the profiler adds to an action, this is a lower
        figure; as it stands, it is too high.

Then the functions written in Python in which the time goes, under cProfile, on the narrow backbone (on a wide
one the operators that are written ``*`` and ``+`` would count as time of the function that contains them);
cProfile slows down every call, so the order says more than the sum.

    python -m benchmarks.overhead [--steps 4] [--hidden 512] [--layers 8] [--policy muxtune] [--functions 20]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.helpers.backbones import llama_of_width, many_mixed_tasks, rough_costs
from benchmarks.helpers.machine import machine_line
from benchmarks.helpers.overhead_run import ActionTimes, WatchedStage, watch_run
from muxtune.cluster import load_cluster
from muxtune.model import ModelSpec
from muxtune.plan import Plan, finish_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.support.tables import format_table, show_percent, show_seconds
from muxtune.tasks import Workload

BAR = 0.05
"""Share of an action's time that Python's overhead may be."""

_NEXT_TO_NOTHING = 8
"""Width of the backbone whose operators have nothing to do."""


def plan_overhead(workload: Workload, model: ModelSpec, *, pp: int, policy: str) -> Plan:
    """A plan for so many stages."""
    return plan_workload(
        workload,
        model,
        load_cluster(f"cpu-{pp}"),
        rough_costs(model),
        policy=policy,
        options=PlanOptions(pp=pp),
    )[0]


def narrowed(plan: Plan) -> Plan:
    """Plan with this schedule over the same tokens, on a backbone of next to no width."""
    model = llama_of_width(_NEXT_TO_NOTHING, plan.model.layers)
    narrowest = min(linear.out_features for linear in model.linears)
    tasks = tuple(
        task.model_copy(update={"peft": task.peft.model_copy(update={"r": min(task.peft.r, narrowest)})})
        for task in plan.tasks
    )
    return finish_plan(plan.with_decisions(model=model, tasks=tasks))


@dataclass(frozen=True, slots=True)
class Overhead:
    """One action, seen in three ways."""

    plain: ActionTimes
    narrow: ActionTimes
    profiled: ActionTimes

    @property
    def beside_s(self) -> float:
        """Seconds of the profiled time outside of operators that compute."""
        return self.profiled.action_s - self.profiled.kernel_s


def measure_overhead(plan: Plan, *, steps: int) -> list[Overhead]:
    """Every kind of action of a plan, in the order of stages and hTasks."""
    runs = (
        watch_run(plan, "none", steps=steps),
        watch_run(narrowed(plan), "none", steps=steps),
        watch_run(plan, "torch", steps=steps),
    )
    actions = ([action for stage in run for action in stage.actions] for run in runs)
    return [Overhead(*same) for same in zip(*actions, strict=True)]


def action_table(measured: Sequence[Overhead]) -> str:
    """One row per forward and backward of an hTask on a stage, and one for all."""
    header = [
        *("stage", "hTask", "action", "processor time", "narrow", "share"),
        *("under profiler", "beside", "share", "descriptions", "operators"),
    ]
    rows = [
        [str(each.plain.stage), str(each.plain.htask), each.plain.kind, *_figures([each])]
        for each in measured
    ]
    return format_table(header, [*rows, ["all", "", "", *_figures(measured)]])


def _figures(measured: Sequence[Overhead]) -> Iterator[str]:
    plain_s, narrow_s = sum(m.plain.action_s for m in measured), sum(m.narrow.action_s for m in measured)
    profiled_s, beside_s = sum(m.profiled.action_s for m in measured), sum(m.beside_s for m in measured)
    yield show_seconds(plain_s)
    yield show_seconds(narrow_s)
    yield show_percent(narrow_s / plain_s)
    yield show_seconds(profiled_s)
    yield show_seconds(beside_s)
    yield show_percent(beside_s / profiled_s)
    yield show_seconds(sum(m.profiled.bookkeeping_s for m in measured))
    yield str(sum(m.profiled.operators for m in measured))


def function_table(stages: Sequence[WatchedStage], count: int) -> str:
    """The functions written in Python with most time of their own, per action."""
    actions = sum(stage.watched for stage in stages)
    own_us: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for function in (function for stage in stages for function in stage.functions):
        if not function.builtin:
            own_us[function.name] += function.own_s * 1e6 / actions
            calls[function.name] += function.calls / actions
    most = sorted(own_us, key=own_us.__getitem__, reverse=True)
    rows = [[name, f"{own_us[name]:.0f}", f"{calls[name]:.1f}"] for name in most[:count]]
    shown = {"others": most[count:], "all": most}
    rows += [
        [name, f"{sum(map(own_us.__getitem__, group)):.0f}", f"{sum(map(calls.__getitem__, group)):.1f}"]
        for name, group in shown.items()
    ]
    return format_table(["function", "us per action", "calls per action"], rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="iterations of every run; the fastest counts")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--policy", default="muxtune", help="temporal-only has the shortest actions")
    parser.add_argument("--batches-divided-by", type=int, default=1)
    parser.add_argument("--functions", type=int, default=20)
    arguments = parser.parse_args()

    model, steps = llama_of_width(arguments.hidden, arguments.layers), arguments.steps
    workload = many_mixed_tasks(1, steps=steps + 1, batches_divided_by=arguments.batches_divided_by)
    print(f"machine: {machine_line()}")
    print(f"8 mixed tasks, {model.name}, policy {arguments.policy}, fastest of {steps} iterations")
    for pp, title in ((2, "a run on two ranks"), (1, "a run in one process")):
        plan = plan_overhead(workload, model, pp=pp, policy=arguments.policy)
        tokens = [htask.tokens_per_microbatch for htask in plan.htasks]
        measured = measure_overhead(plan, steps=steps)
        print(f"\n{title}: {len(tokens)} hTasks of {', '.join(map(str, tokens))} tokens per micro-batch\n")
        print(action_table(measured), flush=True)
    print(f"bar: {BAR:.0%} of an action's time\n\nunder cProfile, on the narrow backbone, in one process\n")
    print(function_table(watch_run(narrowed(plan), "python", steps=steps), arguments.functions))


if __name__ == "__main__":
    main()
