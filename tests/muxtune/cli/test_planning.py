from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from muxtune.plan import Plan, Predicted, load_plan
from muxtune.schedule import load_trace
from tests.muxtune.cli.conftest import task

ROOT = Path(__file__).parents[3]


def errors_of(result) -> int:
    """Lines on stderr that are no warnings; a traceback would have many."""
    lines = result.err.splitlines()
    return sum(not line.startswith("muxtune: warning: ") for line in lines)


def test_plan_writes_a_plan_and_says_what_it_decided(cli, write_workload, profile_path, tmp_path):
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path)
    assert result.code == 0, result.err
    plan = load_plan(tmp_path / "plan.json")
    assert {t.id for t in plan.tasks} == {"a", "b", "c"}
    for words in ("ineffective", "lower bound", "effective tokens/s", "written to plan.json", "llama-tiny"):
        assert words in result.out


def test_plan_prints_the_plan_as_json(cli, write_workload, profile_path, tmp_path):
    out = tmp_path / "deep" / "p.json"
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path, "--out", out, "--json")
    assert result.json == json.loads(out.read_text())


def test_plan_schema_needs_no_workload(cli):
    assert cli("plan", "--schema").json == Plan.model_json_schema()


def test_the_schema_in_the_documentation_is_current():
    documented = json.loads((ROOT / "docs" / "plan.schema.json").read_text())
    assert documented == Plan.model_json_schema(), "run make schema"


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["--policy", "nemo"], lambda plan: plan.policy == "nemo" and len(plan.htasks) == 3),
        (["--partition", "a+b,c"], lambda plan: {h.task_ids for h in plan.htasks} == {("a", "b"), ("c",)}),
        (["--template", "flush"], lambda plan: plan.template == "flush"),
        (["--alignment", "pack"], lambda plan: {h.alignment for h in plan.htasks} == {"pack"}),
        (
            ["--alignment", "chunk", "--chunk-tokens", "256"],
            lambda plan: {h.chunk_tokens for h in plan.htasks} == {256},
        ),
        (  # shorter than the sequences, which then take several
            ["--alignment", "chunk", "--chunk-tokens", "8"],
            lambda plan: {h.chunk_tokens for h in plan.htasks} == {8},
        ),
        (
            ["--tp", "2", "--orchestration", "round-robin"],
            lambda plan: plan.orchestration.mode == "round-robin" and plan.orchestration.launches,
        ),
        (["--pp", "1"], lambda plan: plan.parallelism.pp == 1),
        (["--no-fusion"], lambda plan: {len(h.task_ids) for h in plan.htasks} == {1}),
        (["--no-chunking"], lambda plan: {h.alignment for h in plan.htasks} == {"pad"}),
        (["--no-orchestration"], lambda plan: plan.policy == "muxtune-no-orchestration"),
        (["--cluster", "cpu-1"], lambda plan: plan.cluster.ranks == 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_take_decisions_from_the_search(cli, write_workload, profile_path, tmp_path, options, check):
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path, *options)
    assert result.code == 0, result.err
    assert check(load_plan(tmp_path / "plan.json"))


def test_simulate_prints_the_keys_of_predicted(cli, plan_path, tmp_path):
    trace, gantt = tmp_path / "t.json", tmp_path / "g.png"
    result = cli("simulate", plan_path, "--trace", trace, "--gantt", gantt, "--json")
    assert result.code == 0, result.err
    assert result.json.keys() == Predicted.model_fields.keys()
    planned = load_plan(plan_path).predicted
    assert result.json["iteration_s"] == pytest.approx(planned.iteration_s, rel=1e-9)
    assert {span.stage for span in load_trace(trace)} == {0, 1}
    assert gantt.stat().st_size > 5_000
    assert "lower bound" in cli("simulate", plan_path).out


def test_plan_explains_why_the_winner_won(cli, write_workload, profile_path, tmp_path):
    arguments = ("plan", "--workload", write_workload(), "--profile", profile_path, "--explain")
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert "the winner:" in result.out
    assert "lost on" in result.out
    content = cli(*arguments, "--json").json
    assert content["plan"] == json.loads((tmp_path / "plan.json").read_text())
    explanation = content["explanation"]
    assert explanation["iteration_s"] == pytest.approx(sum(explanation["parts"].values()))
    assert explanation["iteration_s"] == pytest.approx(content["plan"]["predicted"]["iteration_s"])
    assert all(row["slower"] >= -1e-9 or row["missing_bytes"] for row in explanation["runners_up"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "nemo"], "--explain = 'nemo': expected policy muxtune"),
        (["--partition", "a+b,c"], "--explain = True: expected a fusion that is searched"),
    ],
    ids=["policy", "partition"],
)
def test_only_a_search_can_be_explained(cli, write_workload, profile_path, options, message):
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path, "--explain", *options)
    assert result.code == 2
    assert message in result.err


def test_simulate_plays_every_operator(cli, plan_path, profile_path, tmp_path):
    trace = tmp_path / "t.json"
    result = cli("simulate", plan_path, "--operators", "--profile", profile_path, "--trace", trace, "--json")
    assert result.code == 0, result.err
    planned = load_plan(plan_path).predicted
    assert result.json["iteration_s"] == pytest.approx(planned.iteration_s, rel=1e-9)
    categories = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"F", "B", "operator"} <= categories
    noisy = [
        cli(
            "simulate",
            plan_path,
            "--operators",
            "--profile",
            profile_path,
            "--noise",
            0.2,
            "--seed",
            seed,
            "--json",
        )
        for seed in (1, 1, 2)
    ]
    seconds = [each.json["makespan_s"] for each in noisy]
    assert seconds[0] == seconds[1] != seconds[2]


def test_noise_needs_operators(cli, plan_path):
    result = cli("simulate", plan_path, "--noise", 0.2)
    assert result.code == 2
    assert "--noise = 0.2: expected --operators beside it" in result.err


BAD_WORKLOADS = {
    "unknown field": ([task("a", colour="red")], "tasks.0.colour = 'red': expected no such field"),
    "unknown target": (
        [task("a", peft={"method": "lora", "r": 4, "alpha": 8, "targets": ["nope"]})],
        "tasks.a.peft.targets = 'nope': expected a linear of llama-tiny",
    ),
    "too long": ([task("a", max_length=5000)], "tasks.a.max_length = 5000: expected at most 1024"),
    "not divisible": (
        [task("a", micro_batch_size=3)],
        "tasks.a.micro_batch_size = 3: expected a divisor of global_batch_size (8)",
    ),
    "missing dataset": (
        [task("a", dataset={"path": "no.jsonl"})],
        "no.jsonl': expected a readable JSONL file",
    ),
    "missing field": ([{"id": "a"}], "tasks.0.peft = None: expected a value; the field is required"),
}


@pytest.mark.parametrize("case", BAD_WORKLOADS, ids=str)
def test_a_bad_workload_ends_with_2_and_one_line(cli, write_workload, profile_path, tmp_path, case):
    tasks, message = BAD_WORKLOADS[case]
    result = cli("plan", "--workload", write_workload(*tasks), "--profile", profile_path)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert errors_of(result) == 1
    assert not (tmp_path / "plan.json").exists()


BAD_OPTIONS = {
    "policy": (["--policy", "nemmo"], "did you mean 'nemo'?"),
    "model": (["--model", "llama-tny"], "did you mean 'llama-tiny'?"),
    "cluster": (["--cluster", "cpu-x"], "no cluster named 'cpu-x'"),
    "stages": (["--pp", "3"], "--pp = 3: expected 1 to 2"),
    "partition": (["--partition", "a+z,b,c"], "--partition = 'z': expected one of a, b, c"),
    "profile": (["--profile", "none.parquet"], "cannot read the profile none.parquet"),
    "chunk": (["--alignment", "pack", "--chunk-tokens", "8"], "expected nothing: the alignment is pack"),
    "out": (["--out", "."], "--out = '.': expected a file, not a folder"),
    "other profile": (["--model", "gpt2-tiny"], "targets"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS, ids=str)
def test_a_bad_option_ends_with_2_and_one_line(cli, write_workload, profile_path, tmp_path, case):
    options, message = BAD_OPTIONS[case]
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert errors_of(result) == 1
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "3"], "--tp = 3: expected 1 to 2, the ranks of cpu-2"),
        (["--pp", "2", "--dp", "2"], "mesh = '--pp 2, --dp 2': expected at most 2 ranks in all"),
        (["--partition", "a+b"], r"--partition = 'a\+b': expected every task once; c is missing"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    cli, write_workload, monkeypatch, options, message
):
    def measure(*_: object) -> None:
        pytest.fail("costs were asked for")

    monkeypatch.setattr("muxtune.cli.planning.find_costs", measure)
    refused = cli("plan", "--workload", write_workload(), *options)
    assert (refused.code, errors_of(refused)) == (2, 1)
    assert re.search(message, refused.err), refused.err


def test_a_backbone_must_be_named_somewhere(cli, write_workload, profile_path):
    path = write_workload(backbone=None)
    result = cli("plan", "--workload", path, "--profile", profile_path)
    assert result.code == 2
    assert "backbone = None: expected a preset or Hugging Face directory (or --model)" in result.err
    assert cli("plan", "--workload", path, "--profile", profile_path, "--model", "llama-tiny").code == 0


def truncated(content: dict) -> str:
    return json.dumps(content)[:2000]


def wrong_version(content: dict) -> str:
    return json.dumps(content | {"schema_version": 99})


def more_stages_than_ranks(content: dict) -> str:
    content["decisions"]["cluster"]["ranks"] = 1
    return json.dumps(content)


def swapped_actions(content: dict) -> str:
    content["derived"]["schedule"][0].reverse()
    return json.dumps(content)


def extra_field(content: dict) -> str:
    return json.dumps(content | {"colour": "red"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is not a whole JSON file"),
        (wrong_version, "schema_version = 99: expected 2"),
        (more_stages_than_ranks, "expected at most 1, the ranks of cpu-2"),
        (swapped_actions, "schedule[0][0]"),
        (extra_field, "colour = 'red': expected no such field"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "run", "validate"])
def test_a_damaged_plan_is_refused_by_every_reader(cli, plan_path, tmp_path, command, damage, message):
    plan_path.write_text(damage(json.loads(plan_path.read_text())))
    rest = {"simulate": [], "run": ["--out", tmp_path / "run"], "validate": [tmp_path / "run"]}[command]
    result = cli(command, plan_path, *rest)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert errors_of(result) == 1
    assert not (tmp_path / "run").exists()


def test_an_edited_plan_is_refused_by_whoever_reads_it(cli, write_workload, profile_path, tmp_path):
    path, run_dir = tmp_path / "plan.json", tmp_path / "run"
    assert cli("plan", "--workload", write_workload(), "--profile", profile_path, "--out", path).code == 0
    content = json.loads(path.read_text())
    content["decisions"]["tasks"][0]["peft"]["r"] = 64
    path.write_text(json.dumps(content))
    for command in (("simulate", path), ("run", path, "--out", run_dir), ("validate", path, run_dir)):
        result = cli(*command)
        assert result.code == 2
        assert (
            "plan.json: decisions.tasks.a.peft.r = 64: expected what the plan's times and memory were"
            in result.err
        )
        assert result.err.endswith(f"muxtune plan --reprice {path} predicts them anew\n")
    assert not run_dir.exists()
    content["decisions"]["tasks"][0]["peft"]["r"], content["decisions"]["tasks"][0]["learning_rate"] = 4, 0.5
    path.write_text(json.dumps(content))
    assert cli("simulate", path).code == 0
