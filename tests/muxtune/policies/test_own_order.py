"""A policy with a pipeline order of its own: planned, checked, written, simulated and run as it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from muxtune.cluster import load_cluster
from muxtune.model import load_model_spec
from muxtune.plan import check_plan, extend_schedule, finish_plan, load_plan, save_plan
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import POLICIES, fixed_partition, plan_problem
from muxtune.schedule import clocks_of
from muxtune.support.errors import SpecError
from muxtune.support.registry import PluginError
from muxtune.tasks import Workload
from sim import search_problem, simulate_plan
from tests.helpers import make_task, write_examples
from tests.integration.prepared import prepared_ranks
from tests.muxtune.planning.problems import FakeCosts
from tests.muxtune.policies.gpus import gpu_problem


class More:
    """All tasks fused, or an hTask each, with so many more micro-batches in flight on every stage."""

    summary = "one more micro-batch in flight"

    def __init__(self, more: int = 1, fused: bool = True, injection=None) -> None:
        self.more = more
        self.fused = fused
        self.injection = injection

    def propose(self, problem, options):
        groups = [tuple(problem.data)] if self.fused else [(task_id,) for task_id in problem.data]
        found = fixed_partition(problem, options, groups)
        return [self.change(structure) for structure in found]

    def change(self, structure):
        if self.injection is not None:
            structure = replace(structure, injection=self.injection(structure))
        in_flight = tuple(n + self.more for n in structure.clocks_in_flight)
        return replace(structure, in_flight=in_flight if self.more else ())


PIPELINE = PlanOptions(tp=1, pp=4, dp=1, template="flush")


def most_in_flight(plan, stages):
    found = []
    for actions in stages:
        open_ = most = 0
        for clock in clocks_of(actions, plan.microbatches, plan.shared_buckets):
            open_ += {"F": 1, "B": -1, "STEP": 0}[clock[0].kind]
            most = max(most, open_)
        found.append(most)
    return tuple(found)


@pytest.fixture(scope="module")
def plans():
    """Plain 1F1B, and one more in flight; of the same hTasks."""
    problem = gpu_problem(count=3)
    return [search_problem(problem, policy=More(more, fused=False), options=PIPELINE) for more in (0, 1)]


def test_the_limit_is_declared_followed_and_counted(plans):
    plain, more = plans
    assert plain.in_flight == ()
    assert more.in_flight == (5, 4, 3, 2)
    assert most_in_flight(plain, plain.actions) == (4, 3, 2, 1)
    assert most_in_flight(more, more.actions) == (5, 4, 3, 2)
    assert more.htasks == plain.htasks
    for own, other in zip(more.predicted.peak_memory_bytes, plain.predicted.peak_memory_bytes, strict=True):
        assert own > other
    assert [more.open_limit(stage) for stage in range(4)] == [5, 4, 3, 2]


def test_files_simulations_and_whole_runs_follow_it(plans, tmp_path):
    _, more = plans
    save_plan(more, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == more
    assert simulate_plan(loaded).predicted.iteration_s == more.predicted.iteration_s
    longer = simulate_plan(loaded, iterations=3).predicted
    assert longer.iteration_s == pytest.approx(more.predicted.iteration_s, rel=1e-9)
    assert most_in_flight(more, extend_schedule(loaded, 2)) == (5, 4, 3, 2)


def test_undeclared_it_is_refused(plans):
    _, more = plans
    silent = finish_plan(more.with_decisions(in_flight=()))
    with pytest.raises(SpecError, match=r"schedule\[0\]\[\d+\]: F\d+\.\d+ is one more than the 4 allowed"):
        check_plan(silent)
    rising = finish_plan(more.with_decisions(in_flight=(5, 6, 6, 6)))
    with pytest.raises(SpecError, match=r"in_flight = \[5, 6, 6, 6\]: expected 4 integers"):
        check_plan(rising)


def rounds(structure):
    """All micro-batches of the first hTask, then all of the next."""
    return tuple(h for h, m in enumerate(structure.microbatches) for _ in range(m))


def test_an_order_of_ones_own_is_planned_and_simulated():
    problem = gpu_problem(count=3)
    plan = search_problem(problem, policy=More(0, fused=False, injection=rounds), options=PIPELINE)
    entered = tuple(action.htask for action in plan.actions[0] if action.kind == "F")
    assert plan.injection == entered == rounds(plan)
    assert simulate_plan(plan).predicted.iteration_s == plan.predicted.iteration_s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"injection": (0, 0)}, r"\[0\]\.injection = \[0, 0\]: expected every micro-batch"),
        ({"in_flight": (1, 2, 3, 4)}, r"\[0\]\.in_flight = \[1, 2, 3, 4\]: expected 4 integers"),
    ],
)
def test_what_cannot_be_is_the_policys_fault(change, message):
    class Wrong(More):
        def change(self, structure):
            return replace(structure, **change)

    with pytest.raises(PluginError, match=message):
        plan_problem(gpu_problem(count=3), policy=Wrong(), options=PIPELINE)


def test_more_in_flight_may_not_fit_the_memory():
    problem = gpu_problem(count=3)
    plain, more = (plan_problem(problem, policy=More(n, fused=False), options=PIPELINE)[0] for n in (0, 40))
    between = (max(plain.predicted.peak_memory_bytes) + max(more.predicted.peak_memory_bytes)) // 2
    device = problem.cluster.device.model_copy(update={"memory_bytes": between})
    cluster = problem.cluster.model_copy(update={"device": device})
    tight = PlanningProblem(Workload(tasks=tuple(problem.tasks)), problem.model, cluster, problem.costs)
    assert plan_problem(tight, policy=More(0, fused=False), options=PIPELINE)
    with pytest.raises(SpecError, match="memory_bytes"):
        plan_problem(tight, policy=More(40, fused=False), options=PIPELINE)


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_ends_with_the_same_adapters(tmp_path, hf_dirs):
    """What is in flight, and in which order tasks enter, changes no result."""
    from runtime import run_plan

    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=i), steps=3, global_batch_size=8)
        for i, name in enumerate("ab")
    )
    model = load_model_spec(str(hf_dirs["llama"]), "float64")
    problem = PlanningProblem(Workload(tasks=tasks), model, load_cluster("cpu-2"), FakeCosts())
    options = PlanOptions(pp=2, alignment="pack", template="continuous")
    weights = []
    for number, policy in enumerate((More(0, fused=False), More(1, fused=False, injection=rounds))):
        plan = search_problem(problem, policy=policy, options=options)
        assert plan.in_flight == ((3, 2) if number else ())
        with prepared_ranks():
            run_plan(plan, tmp_path / f"run{number}")
        files = sorted((tmp_path / f"run{number}").rglob("adapter/adapter_model.safetensors"))
        assert len(files) == 2
        weights.append([load_file(file) for file in files])
    for plain, own in zip(*weights, strict=True):
        assert plain.keys() == own.keys()
        for name, tensor in plain.items():
            assert tensor.equal(own[name])


def test_the_stock_policies_declare_nothing():
    assert POLICIES.get("muxtune") is not None
    plan = plan_problem(gpu_problem(count=2))[0]
    assert (plan.injection, plan.in_flight) == ((), ())
