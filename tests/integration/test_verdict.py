"""One tenant's step that is not finite, in a strict run: it ends, and leaves what is good for all tenants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.support.errors import RunError
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan
from runtime.tasks import tenant as tenants
from runtime.tasks.checkpoint import RunCheckpoints
from tests.helpers import make_plan, make_task, write_examples
from tests.integration.faults import BAD_STEP, SAID, STEPS, Case, spoil
from tests.integration.prepared import prepared_ranks
from tests.integration.processes import rank_pids
from tests.sampling import in_full

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVERY = 2
"""Checkpoints of steps 2, 4 and 6 are good, as the step that goes wrong is the seventh."""

STRICT_CASES = [
    Case("flush", clips=True, rank=0, pp=2),
    Case("continuous", clips=False, rank=1, pp=2),
    Case("continuous", clips=False, rank=1, tp=2),
    *in_full(Case("flush", clips=True, rank=0, dp=2), Case("continuous", clips=False, rank=2, pp=2, tp=2)),
]


def _plan(case: Case, folder: Path, hf_dirs: dict[str, Path]) -> Plan:
    tasks = tuple(
        make_task(
            name,
            write_examples(folder / f"{name}.jsonl", seed=i),
            steps=steps,
            max_grad_norm=0.05 if case.clips else None,
        )
        for i, (name, steps) in enumerate([("a", STEPS), ("b", STEPS), ("c", 3), ("d", STEPS)])
    )
    return make_plan(
        Workload(tasks=tasks),
        load_model_spec(str(hf_dirs["llama"]), "float32"),
        partition=[["a", "b"], ["c"], ["d"]],
        template=case.template,
        pp=case.pp,
        tp=case.tp,
        dp=case.dp,
    )


def _adapters(run_dir: Path, plan: Plan) -> dict[str, torch.Tensor]:
    return {
        f"{task.id}/{key}": tensor
        for task in plan.tasks
        for key, tensor in load_file(
            run_dir / "tasks" / task.id / "adapter" / "adapter_model.safetensors"
        ).items()
    }


def _run_into_fault(plan: Plan, run_dir: Path, before: Callable[[int], None] | None) -> str:
    with prepared_ranks(before), pytest.raises(RunError) as caught:
        run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY, strict=True))
    assert rank_pids(run_dir) == {}
    return str(caught.value)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, hf_dirs) -> Callable[[Case], tuple[Plan, dict[str, torch.Tensor]]]:
    """Plan and adapters of a case without its fault; the data lies in one place, so plans are shared."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def run(case: Case) -> tuple[Plan, dict[str, torch.Tensor]]:
        plan = _plan(case, folder, hf_dirs)
        with prepared_ranks():
            run_plan(plan, folder / str(case))
        return plan, _adapters(folder / str(case), plan)

    return lambda case: run(replace(case, fault="inf", rank=0))


@pytest.mark.parametrize("case", STRICT_CASES, ids=str)
def test_a_step_that_is_not_finite_reaches_no_checkpoint_and_nobody_loses_anything(
    case, tmp_path, undisturbed
):
    plan, expected = undisturbed(case)
    run_dir = tmp_path / "run"
    message = _run_into_fault(plan, run_dir, partial(spoil, case=case))
    writer = (case.pp - 1) * case.tp
    assert re.match(rf"rank {writer}: task b, step {BAD_STEP}: {SAID[case.fault]}", message)
    assert f"the checkpoint of step {BAD_STEP} is kept: --resume goes on from it" in message
    assert "\n" not in message

    checkpoints = RunCheckpoints(run_dir, plan)
    assert checkpoints.iterations() == [4, 6]
    assert checkpoints.whole().iteration == 6
    for step in (4, 6):
        for task in plan.tasks:
            state = checkpoints.load(task.id, step)
            assert set(state.optimizer_steps.values()) == {min(step, task.steps)}, "of one iteration"
            assert state.tensors.keys() == {"adapter", "exp_avg", "exp_avg_sq"}
            assert all(t.isfinite().all() for group in state.tensors.values() for t in group.values())
    status = json.loads((run_dir / "tasks" / "b" / "status.json").read_text())
    assert (status["state"], status["steps_done"]) == ("failed", BAD_STEP)

    with prepared_ranks():
        assert run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY, resume=True)).first_step == 6
    resumed = _adapters(run_dir, plan)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_the_line_says_how_to_end_before_the_bad_step(tmp_path, hf_dirs):
    """The steps between the checkpoint and the fault are not lost either."""
    case = Case("continuous", clips=False, rank=0, pp=2)
    plan = _plan(case, tmp_path, hf_dirs)
    with prepared_ranks(partial(spoil, case=case)):
        with pytest.raises(RunError, match=r"checkpoint of step 5 is kept: --resume --steps 6 ends before"):
            run_plan(plan, tmp_path / "run", RunOptions(checkpoint_every=5, strict=True))
        report = run_plan(plan, tmp_path / "run", RunOptions(resume=True, steps=6))
    assert (report.first_step, report.steps) == (5, 6)


def test_without_a_checkpoint_the_line_says_so(tmp_path, hf_dirs):
    case = Case("flush", clips=False, rank=0)
    plan = _plan(case, tmp_path, hf_dirs)
    with (
        prepared_ranks(partial(spoil, case=case)),
        pytest.raises(RunError, match=r"; no checkpoint was written before it; a new run with --steps 6"),
    ):
        run_plan(plan, tmp_path / "run", RunOptions(checkpoint_every=50, strict=True))


def overdo(_rank: int) -> None:
    """Have a rank take steps of task b at a rate beyond single precision, which no workload may ask for."""
    usual = tenants.learning_rate
    tenants.learning_rate = lambda task, step: 1e39 if task.id == "b" and step else usual(task, step)


@pytest.mark.parametrize("steps", [EVERY, EVERY + 1])
@pytest.mark.parametrize("pp", [1, 2])
def test_adapters_that_overflow_in_a_step_are_not_written(tmp_path, hf_dirs, steps, pp):
    """Loss and gradient are finite, the rate is not: neither a checkpoint nor the results may hold it."""
    case = Case("continuous", clips=False, rank=0, pp=pp)
    plan = _plan(case, tmp_path, hf_dirs)
    with (
        prepared_ranks(overdo),
        pytest.raises(RunError, match=r"task b, step 1: adapter or optimizer state is"),
    ):
        run_plan(plan, tmp_path / "run", RunOptions(checkpoint_every=EVERY, steps=steps, strict=True))
    assert RunCheckpoints(tmp_path / "run", plan).iterations() == []
    assert not list((tmp_path / "run").glob("tasks/*/adapter"))
    assert not (tmp_path / "run" / "run.json").exists()
