"""Plans that nobody searches: an edited plan is priced anew, a file of decisions is planned."""

from __future__ import annotations

import json

import pytest

from muxtune.plan import load_plan
from tests.helpers import write_examples
from tests.muxtune.cli.conftest import task

PRICED = ("iteration_s", "peak_memory_bytes", "fwd_s", "bwd_s", "makespan_s")


def edit(path, change, *, part="decisions"):
    content = json.loads(path.read_text())
    change(content[part])
    path.write_text(json.dumps(content))


def layers(decisions):
    decisions["parallelism"] = {"tp": 1, "pp": 2, "dp": 1, "layers_per_stage": [1, 7]}


EDITS = {
    "layers": layers,
    "template": lambda d: d.update(template="gpipe"),
    "alignment": lambda d: [
        h.update(alignment="pad", chunk_tokens=None, carry_microbatches=1) for h in d["htasks"]
    ],
    "chunks": lambda d: d["htasks"][0].update(alignment="chunk", chunk_tokens=16),
    "micro-batches": lambda d: d["htasks"][0].update(microbatches=8),
    "rank": lambda d: d["tasks"][0]["peft"].update(r=16),
    "lengths": lambda d: d["tasks"][0]["dataset"].update(lengths="rte"),
    "fusion": lambda d: d.update(
        htasks=[{"task_ids": [t["id"] for t in d["tasks"]], "alignment": "pack"}], buckets=[[0]]
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_plan_is_refused_and_priced_anew(cli, plan_path, profile_path, tmp_path, name):
    before = load_plan(plan_path)
    edit(plan_path, EDITS[name])
    words = set()
    for command in (("simulate", plan_path), ("run", plan_path, "--out", tmp_path / "run")):
        refused = cli(*command)
        assert refused.code == 2
        words.add(refused.err)
    (line,) = words
    assert line.startswith(f"muxtune: error: {plan_path}: decisions.")
    assert line.endswith(f"muxtune plan --reprice {plan_path} predicts them anew\n")
    assert not (tmp_path / "run").exists()

    result = cli("plan", "--reprice", plan_path, "--profile", profile_path)
    assert result.code == 0, result.err
    after = load_plan(plan_path)
    edited = {field: getattr(after.predicted, field) for field in PRICED}
    assert edited != {field: getattr(before.predicted, field) for field in PRICED}
    simulated = cli("simulate", plan_path, "--json")
    assert simulated.json["iteration_s"] == pytest.approx(after.predicted.iteration_s, rel=1e-9)
    operators = cli("simulate", plan_path, "--operators", "--profile", profile_path, "--json")
    assert operators.json["iteration_s"] == pytest.approx(after.predicted.iteration_s, rel=1e-9)


def test_a_plan_that_nobody_edited_is_priced_as_it_was(cli, plan_path, profile_path, tmp_path):
    before = plan_path.read_bytes()
    assert (
        cli("plan", "--reprice", plan_path, "--profile", profile_path, "--out", tmp_path / "b.json").code == 0
    )
    assert (tmp_path / "b.json").read_bytes() == before == plan_path.read_bytes()


def test_what_is_derived_or_predicted_need_not_be_there(cli, plan_path, profile_path):
    before = plan_path.read_bytes()
    content = json.loads(before)
    plan_path.write_text(
        json.dumps({"schema_version": 2, "decisions": content["decisions"], "predicted": "?"})
    )
    assert cli("plan", "--reprice", plan_path, "--profile", profile_path).code == 0
    assert plan_path.read_bytes() == before


@pytest.mark.parametrize("part", ["derived", "predicted"])
def test_edits_of_what_follows_are_refused(cli, plan_path, profile_path, part):
    before = plan_path.read_bytes()
    change = {"derived": {"contention": 0.5}, "predicted": {"iteration_s": 1.0}}[part]
    edit(plan_path, lambda content: content.update(change), part=part)
    refused = cli("simulate", plan_path)
    assert refused.code == 2
    assert f"{part}.{next(iter(change))} = " in refused.err
    assert cli("plan", "--reprice", plan_path, "--profile", profile_path).code == 0
    assert plan_path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(source="/nowhere"),
        lambda d: d["tasks"][0]["dataset"].update(path="/nowhere.jsonl"),
    ],
    ids=["source", "dataset"],
)
def test_simulate_and_run_treat_moved_inputs_alike(cli, write_workload, profile_path, tmp_path, change):
    data = write_examples(tmp_path / "a.jsonl", seed=0)
    workload = write_workload(task("a", dataset={"path": str(data)}))
    assert cli("plan", "--workload", workload, "--profile", profile_path).code == 0
    path = tmp_path / "plan.json"
    edit(path, change)
    simulated, run = cli("simulate", path), cli("run", path, "--out", tmp_path / "run")
    assert (simulated.code, simulated.err) == (run.code, run.err)
    assert simulated.code == 2
    assert "/nowhere" in simulated.err
    refused = cli("plan", "--reprice", path, "--profile", profile_path)
    assert refused.code == 2
    assert "/nowhere" in refused.err


def test_a_dataset_that_changed_is_read_anew(cli, write_workload, profile_path, tmp_path):
    data = write_examples(tmp_path / "a.jsonl", seed=0)
    workload = write_workload(task("a", dataset={"path": str(data)}))
    assert cli("plan", "--workload", workload, "--profile", profile_path).code == 0
    before = load_plan(tmp_path / "plan.json")
    assert before.tasks[0].dataset.sha256 == before.derived.dataset_sha256[0] is not None
    write_examples(data, seed=1, longest=40)
    assert cli("plan", "--reprice", tmp_path / "plan.json", "--profile", profile_path).code == 0
    after = load_plan(tmp_path / "plan.json")
    assert after.decisions == before.decisions
    assert after.derived.dataset_sha256 != before.derived.dataset_sha256


def test_other_costs_than_the_plans_are_refused(cli, write_workload, tmp_path):
    options = ("--workload", write_workload(), "--model", "llama2-7b", "--cluster", "testbed-a")
    assert cli("plan", *options).code == 0
    path = tmp_path / "plan.json"
    edit(path, lambda d: d["costs"].update(profile_id="mine", digest="0" * 64))
    refused = cli("plan", "--reprice", path)
    assert refused.code == 2
    assert "decisions.costs.profile_id = 'mine': expected analytic-a40-" in refused.err
    edit(path, lambda d: d.update(costs=None))
    assert cli("plan", "--reprice", path).code == 0
    assert load_plan(path).costs.profile_id.startswith("analytic-a40-")


DECISIONS = """\
workload: workload.yaml
model: llama2-7b
cluster: testbed-a
parallelism: {tp: 2, layers_per_stage: [15, 17]}
htasks:
  - {task_ids: [a, b], alignment: pack}
  - {task_ids: [c], alignment: chunk, chunk_tokens: 128, carry_microbatches: 2}
buckets: [[1, 0]]
template: flush
orchestration: {mode: interleaved}
"""


def test_a_file_of_decisions_is_planned_as_it_says(cli, write_workload, tmp_path):
    write_workload()
    (tmp_path / "d.yaml").write_text(DECISIONS)
    assert len(DECISIONS.splitlines()) <= 20
    result = cli("plan", "--decisions", "d.yaml")
    assert result.code == 0, result.err
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.policy, plan.template, plan.buckets) == ("by-hand", "flush", ((1, 0),))
    assert plan.parallelism.layers_per_stage == (15, 17)
    assert (plan.parallelism.tp, plan.parallelism.pp, plan.parallelism.dp) == (2, 2, 1)
    first, second = plan.htasks
    assert (first.task_ids, first.alignment) == (("a", "b"), "pack")
    assert (second.chunk_tokens, second.carry_microbatches) == (128, 2)
    assert plan.orchestration.launches
    assert plan.predicted.mfu is not None
    assert "MFU" in result.out


def test_what_is_not_written_is_chosen(cli, write_workload, tmp_path):
    write_workload()
    (tmp_path / "d.yaml").write_text("workload: workload.yaml\nmodel: llama2-7b\ncluster: testbed-a\n")
    assert cli("plan", "--decisions", "d.yaml").code == 0
    plan = load_plan(tmp_path / "plan.json")
    assert [htask.task_ids for htask in plan.htasks] == [("a",), ("b",), ("c",)]
    assert plan.buckets == ((0,), (1,), (2,))
    assert (plan.parallelism.tp, plan.parallelism.pp, plan.parallelism.dp) == (1, 4, 1)
    assert sum(plan.parallelism.layers_per_stage) == 32
    assert (plan.template, plan.orchestration.mode) == ("continuous", "sequential")


WRONG = {
    "no workload": ("model: llama-tiny", "d.yaml: workload = None: expected a value"),
    "unknown field": ("workload: workload.yaml\nfusion: x", "d.yaml: fusion = 'x': expected no such field"),
    "unknown task": (
        "workload: workload.yaml\nhtasks: [{task_ids: [z]}]",
        "d.yaml: htasks[0].task_ids = 'z': expected one of a, b, c",
    ),
    "a task is missing": (
        "workload: workload.yaml\nhtasks: [{task_ids: [a]}]",
        "d.yaml: htasks.task_ids = ['a']: expected every task in exactly one hTask",
    ),
    "layers": (
        "workload: workload.yaml\nparallelism: {layers_per_stage: [1, 2]}",
        "d.yaml: parallelism.layers_per_stage = [1, 2]: expected 2 integers with sum 8",
    ),
    "ranks": ("workload: workload.yaml\nparallelism: {pp: 3}", "(tp * pp * dp) = 3: expected at most 2"),
    "chunks": (
        "workload: workload.yaml\nhtasks: [{task_ids: [a, b, c], alignment: pad, chunk_tokens: 8}]",
        "d.yaml: htasks[0].chunk_tokens = 8: expected nothing: the alignment is pad",
    ),
    "carry": (
        "workload: workload.yaml\nhtasks: [{task_ids: [a, b, c], carry_microbatches: 3}]",
        "d.yaml: htasks[0].carry_microbatches = 3: expected a power of two",
    ),
    "empty": ("", "d.yaml = None: expected a mapping with the key workload"),
    "no list": ("workload: workload.yaml\nbuckets: 3", "d.yaml: buckets = 3: expected a valid list"),
    "no entry": ("workload: workload.yaml\nhtasks: []", "d.yaml: htasks = []: expected at least 1, not 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_decisions_are_one_line(cli, write_workload, profile_path, tmp_path, name):
    text, message = WRONG[name]
    write_workload()
    (tmp_path / "d.yaml").write_text(text)
    result = cli("plan", "--decisions", "d.yaml", "--profile", profile_path)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len([line for line in result.err.splitlines() if "warning" not in line]) == 1
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workload = None: expected a workload file (or --decisions, or --reprice)"),
        (("--reprice", "p.json", "--policy", "nemo"), "--policy = 'nemo': expected nothing beside --reprice"),
        (("--reprice", "p.json", "--no-fusion"), "--no-fusion = True: expected nothing beside --reprice"),
        (("--decisions", "d.yaml", "--pp", "2"), "--pp = 2: expected nothing beside --decisions"),
        (("--decisions", "d.yaml", "--reprice", "p.json"), "--reprice = 'p.json': expected nothing beside"),
        (("--reprice", "none.json"), "cannot read the plan none.json"),
        (("--decisions", "none.yaml"), "cannot read the decisions none.yaml"),
    ],
)
def test_options_that_decisions_say_are_refused(cli, arguments, message):
    result = cli("plan", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
