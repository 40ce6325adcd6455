"""plan.json: what is written is what is read, and a plan that contradicts itself is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from muxtune.batches import AlignmentReport
from muxtune.batches.token_report import TokenCounts
from muxtune.graph.attention_backends import DEFAULT_ATTENTION
from muxtune.plan import Orchestration, Plan, check_plan, finish_plan, load_plan, save_plan
from muxtune.schedule import Action
from muxtune.support.errors import SpecError, UserError
from tests.plans import changed, make_plan
from tests.sampling import examples

TEMPLATES = ("flush", "continuous", "gpipe", "lorapp")
OPTIONAL = {"schema_version"}
SHARED = Orchestration(mode="interleaved", contention=0.25, adapters="separate")


@pytest.fixture
def content():
    """A valid plan as plain data, on two stages."""
    return json.loads(make_plan().model_dump_json())


def load_changed(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    return load_plan(path)


def set_at(content, path, value):
    *parents, last = path
    for part in parents:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_plan_is_read_back_equal(tmp_path, template, pp):
    plan = make_plan(template=template, pp=pp)
    path = tmp_path / "folder" / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert Plan.model_validate_json(path.read_text()) == plan
    save_plan(load_plan(path), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_plan_whose_parts_were_looked_at_is_still_equal_to_its_copy():
    plan, fresh = make_plan(), make_plan()
    assert plan.actions
    assert plan.tasks_by_id
    assert plan == fresh
    assert plan.model_dump_json() == fresh.model_dump_json()


def test_the_keys_are_those_of_the_design(content):
    assert list(content) == ["schema_version", "decisions", "derived", "predicted"]
    assert list(content["decisions"]) == (
        "policy policy_options objective model cluster costs parallelism tasks htasks buckets template "
        "injection in_flight orchestration execution".split()
    )
    assert list(content["decisions"]["parallelism"]) == ["tp", "pp", "dp", "layers_per_stage"]
    assert list(content["derived"]) == (
        (
            "backbone dataset_sha256 init_sha256 htasks schedule contention launches useful_flops cost_notes"
        ).split()
    )
    assert content["derived"]["schedule"][0][0] == ["F", 1, 0]


def test_the_json_schema_can_be_produced_and_describes_every_key(content):
    schema = json.loads(json.dumps(Plan.model_json_schema()))
    assert set(schema["properties"]) == set(content)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(content) - OPTIONAL


def test_attention_is_by_the_default_where_a_plan_does_not_say(content):
    del content["decisions"]["execution"]
    assert Plan.model_validate(content).execution.attention == DEFAULT_ATTENTION
    content["decisions"]["execution"] = {"attention": "lopp"}
    with pytest.raises(ValidationError, match="'grouped', 'loop', 'varlen', 'flex' or 'masked'"):
        Plan.model_validate(content)


def test_a_plan_answers_what_simulator_and_runtime_ask():
    plan = make_plan(pp=4)
    assert plan.actions[3][0] == Action("F", 1, 0)
    assert plan.microbatches == (2, 2)
    assert [task.id for task in plan.htask_tasks(0)] == ["a", "b"]
    assert (plan.shape(0).row_tokens, plan.shape(1).row_tokens) == (64, 128)
    assert plan.shape(0).tokens == plan.htasks[0].tokens_per_microbatch
    assert plan.htask_steps() == [4, 4]
    assert plan.htask_steps(3) == [3, 3]
    assert [list(plan.stage_layers(s)) for s in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert plan.parallelism.ranks == 4


@given(st.data())
@settings(max_examples=examples(60))
def test_a_truncated_plan_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(make_plan(), path)
    whole = path.read_text()
    path.write_text(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1))])
    with pytest.raises(UserError, match="is not a whole JSON file") as caught:
        load_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the plan .*none\.json: No such file or directory"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a whole JSON file"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_another_version_is_refused_before_anything_else(tmp_path, content, version):
    content = {"schema_version": version, "unknown": 1}
    with pytest.raises(
        SpecError, match=r"plan\.json: schema_version = .*: expected 2, the version that this.*plan again"
    ):
        load_changed(tmp_path, content)


@pytest.mark.parametrize("content", [[], 3, "plan", None, {}])
def test_json_that_is_no_plan_is_refused(tmp_path, content):
    with pytest.raises(SpecError, match="schema_version = None: expected 2"):
        load_changed(tmp_path, content)


FIELDS = [
    (("modle",), {}, "modle = {}: expected no such field"),
    (
        ("decisions", "model", "family"),
        "bloom",
        "decisions.model.family = 'bloom': expected 'llama', 'gpt2' or 'opt'",
    ),
    (("decisions", "model", "layers"), 0, "decisions.model.layers = 0: expected greater than 0"),
    (("decisions", "cluster", "ranks"), 0, "decisions.cluster.ranks = 0: expected greater than 0"),
    (("decisions", "costs", "digest"), None, "decisions.costs.digest = None: expected a valid string"),
    (("decisions", "parallelism", "tp"), 0, "decisions.parallelism.tp = 0: expected greater than 0"),
    (("decisions", "parallelism", "dp"), -1, "decisions.parallelism.dp = -1: expected greater than 0"),
    (("decisions", "parallelism", "pp"), 0, "decisions.parallelism.pp = 0: expected greater than 0"),
    (
        (
            "decisions",
            "tasks",
        ),
        [],
        "decisions.tasks = []: expected",
    ),
    (("decisions", "tasks", 0, "steps"), 0, "decisions.tasks.0.steps = 0: expected greater than 0"),
    (
        (
            "decisions",
            "htasks",
        ),
        [],
        "decisions.htasks = []: expected",
    ),
    (
        ("decisions", "htasks", 0, "alignment"),
        "wrap",
        "decisions.htasks.0.alignment = 'wrap': expected 'pad', 'pack' or 'chunk'",
    ),
    (
        ("decisions", "htasks", 0, "task_tokens"),
        [256, 256],
        "decisions.htasks.0.task_tokens = [256, 256]: expected no such field",
    ),
    (
        ("derived", "htasks", 0, "microbatches"),
        0,
        "derived.htasks.0.microbatches = 0: expected greater than 0",
    ),
    (
        (
            "decisions",
            "buckets",
        ),
        [],
        "decisions.buckets = []: expected",
    ),
    (
        (
            "decisions",
            "template",
        ),
        "zero",
        "decisions.template = 'zero': expected 'flush', 'continuous', 'gpipe' or 'lorapp'",
    ),
    (("derived", "schedule", 0, 0), ["W", 0, 0], "derived.schedule.0.0.0 = 'W': expected 'F', 'B' or 'STEP'"),
    (("derived", "schedule", 0, 0), ["F", 0], "derived.schedule.0.0.2 = None: expected a value"),
    (
        ("decisions", "orchestration", "mode"),
        "magic",
        "decisions.orchestration.mode = 'magic': expected 'sequential', 'intra', 'round-robin' or 'inter",
    ),
    (
        ("derived", "contention"),
        -0.1,
        "derived.contention = -0.1: expected greater than or equal",
    ),
    (
        ("decisions", "orchestration", "adapters"),
        "none",
        "decisions.orchestration.adapters = 'none': expected 'grouped' or 'separ",
    ),
    (("predicted", "clock_s"), [{"kind": "F", "htasks": [0], "seconds": []}], "predicted.clock_s.0.htasks ="),
    (("predicted", "iteration_s"), None, "predicted.iteration_s = None: expected a valid number"),
    (("predicted", "iteration_s"), float("nan"), "predicted.iteration_s = nan: expected a finite number"),
]
CONTRADICTIONS = [
    (
        ("decisions", "parallelism", "layers_per_stage"),
        [4, 3],
        "decisions.parallelism.layers_per_stage = [4, 3]: expected 2 integers with sum 8",
    ),
    (
        ("decisions", "parallelism", "layers_per_stage"),
        [8],
        "decisions.parallelism.layers_per_stage = [8]: expected 2 integers with sum 8",
    ),
    (
        ("decisions", "parallelism", "layers_per_stage"),
        [8, 0],
        "decisions.parallelism.layers_per_stage = [8, 0]: expected at least 1 per stage",
    ),
    (
        ("decisions", "parallelism", "layers_per_stage"),
        [9, -1],
        "decisions.parallelism.layers_per_stage = [9, -1]: expected at least 1",
    ),
    (
        ("decisions", "parallelism", "pp"),
        3,
        "decisions.parallelism.layers_per_stage = [4, 4]: expected 3 integers with sum 8",
    ),
    (
        ("decisions", "model", "layers"),
        9,
        "decisions.parallelism.layers_per_stage = [4, 4]: expected 2 integers with sum 9",
    ),
    (
        ("decisions", "parallelism", "tp"),
        2,
        "decisions.parallelism (tp * pp * dp) = 4: expected at most 2, the ranks of cpu-2",
    ),
    (
        ("decisions", "parallelism", "dp"),
        3,
        "decisions.parallelism (tp * pp * dp) = 6: expected at most 2, the ranks of cpu-2",
    ),
    (
        ("decisions", "cluster", "ranks"),
        1,
        "decisions.parallelism (tp * pp * dp) = 2: expected at most 1, the ranks of cpu-2",
    ),
    (("decisions", "tasks", 1, "id"), "a", "decisions.tasks = ['a', 'a', 'c']: expected unique ids"),
    (
        ("decisions", "tasks", 0, "micro_batch_size"),
        3,
        "decisions.tasks.a.micro_batch_size = 3: expected a divisor of global_batch_size (8)",
    ),
    (
        ("decisions", "tasks", 2, "max_length"),
        2000,
        "decisions.tasks.c.max_length = 2000: expected at most 1024",
    ),
    (
        ("decisions", "tasks", 0, "peft", "targets"),
        ["c_attn"],
        "decisions.tasks.a.peft.targets = 'c_attn': expected a linear of llama-tiny",
    ),
    (
        ("decisions", "tasks", 0, "micro_batch_size"),
        2,
        "derived.htasks[0].microbatches = 2: expected at least 4: a allows no more sequences",
    ),
    (
        ("decisions", "htasks", 1, "task_ids"),
        ["z"],
        "decisions.htasks[1].task_ids = 'z': expected one of a, b, c",
    ),
    (
        ("decisions", "htasks", 1, "task_ids"),
        ["a"],
        "decisions.htasks.task_ids = ['a', 'b', 'a']: expected every task in exactly one hTask",
    ),
    (
        ("decisions", "htasks", 0, "chunk_tokens"),
        64,
        "decisions.htasks[0].chunk_tokens = 64: expected a chunk length under chunk",
    ),
    (
        ("decisions", "htasks", 0, "carry_microbatches"),
        2,
        "decisions.htasks[0].carry_microbatches = 2: expected 1: only chunks are carried on",
    ),
    (
        ("decisions", "htasks", 0, "alignment"),
        "chunk",
        "decisions.htasks[0].chunk_tokens = None: expected a chunk length under chunk",
    ),
    (("derived", "htasks", 0, "microbatches"), 1, "derived.htasks[0].microbatches = 1: expected at least 2"),
    (
        (
            "decisions",
            "buckets",
        ),
        [[1]],
        "decisions.buckets = [[1]]: expected every hTask from 0 to 1 once",
    ),
    (
        (
            "decisions",
            "buckets",
        ),
        [[1], [0, 1]],
        "decisions.buckets = [[1], [0, 1]]: expected every hTask from 0 to 1 once",
    ),
    (
        (
            "decisions",
            "buckets",
        ),
        [[0, 1], []],
        "decisions.buckets = [[0, 1], []]: expected every hTask from 0 to 1 once",
    ),
    (
        (
            "decisions",
            "buckets",
        ),
        [[0, 2]],
        "decisions.buckets = [[0, 2]]: expected every hTask from 0 to 1 once",
    ),
    (
        (
            "derived",
            "schedule",
        ),
        [[]],
        "derived.schedule = '1 entries': expected one per stage (2)",
    ),
    (
        (
            "derived",
            "schedule",
        ),
        [[], []],
        "derived.schedule = 'no action of hTask 0': expected at least one step of every hTask",
    ),
    (("derived", "schedule", 1, 0), ["F", 1, 1], "derived.schedule[1][1]: B1.0 runs before its F1.0"),
    (
        ("derived", "schedule", 0, 0),
        ["F", 7, 0],
        "derived.schedule[0][0]: F7.0 names an hTask that the plan does not have",
    ),
    (
        ("predicted", "fwd_s"),
        [[0.1, 0.1]],
        "predicted.fwd_s = [2]: expected 2 rows (stages) of 2 numbers (hTasks)",
    ),
    (("predicted", "bwd_s"), [[0.1, 0.1], [0.1]], "predicted.bwd_s = [2, 1]: expected 2 rows"),
    (("predicted", "p2p_s"), [0.1], "predicted.p2p_s = 1: expected 2 numbers, one per hTask"),
    (
        ("predicted", "scheduled_iterations"),
        7,
        "predicted.scheduled_iterations = 7: expected 3, the iterations of the schedule",
    ),
    (("predicted", "peak_memory_bytes"), [1], "predicted.peak_memory_bytes = 1: expected 2 numbers"),
    (
        ("predicted", "clock_s"),
        [{"kind": "F", "htasks": [1, 0], "seconds": [0.1, 0.1]}],
        "predicted.clock_s = ['F of [1, 0]']: expected nothing: no clocks are shared (sequential)",
    ),
]
SHARED_CONTRADICTIONS = [
    (
        ("decisions", "orchestration", "mode"),
        "intra",
        "derived.schedule[0][2]: F1.1 is one more than the 2 allowed in flight",
    ),
    (("predicted", "clock_s"), [], "predicted.clock_s = []: expected B of [1, 0], F of [1, 0]"),
    (("predicted", "clock_s", 0, "htasks"), [0, 1], "predicted.clock_s = ['F of [0, 1]', 'B of [1, 0]']"),
    (("predicted", "clock_s", 1, "seconds"), [0.1], "predicted.clock_s[1].seconds = 1: expected 2 numbers"),
    (
        ("decisions", "htasks", 1, "instance"),
        1,
        "decisions.htasks.instance = [0, 1]: expected one, as hTasks [1, 0] share clocks",
    ),
    (
        (
            "decisions",
            "buckets",
        ),
        [[0, 1]],
        "derived.schedule[0][1]: F0.0 stands behind F1.0, against the order of their bucket",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    SHARED_CONTRADICTIONS,
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_contradiction_about_shared_clocks_is_refused(path, value, message):
    content = json.loads(make_plan(orchestration=SHARED).model_dump_json())
    set_at(content, path, value)
    with pytest.raises(SpecError) as caught:
        check_plan(finish_plan(Plan.model_validate(content)))
    assert str(caught.value).removeprefix("plan: ").startswith(message)


@pytest.mark.parametrize("mode", ["round-robin", "interleaved"])
def test_a_plan_with_shared_clocks_says_how_long_they_take(tmp_path, mode):
    plan = make_plan(orchestration=Orchestration(mode=mode))
    assert [(c.kind, c.htasks, c.seconds) for c in plan.predicted.clock_s] == [
        ("F", (1, 0), (0.018, 0.018)),
        ("B", (1, 0), (0.035, 0.035)),
    ]
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.shared_buckets == ((1, 0),)
    assert [plan.open_limit(stage) for stage in (0, 1)] == [4, 2]


def test_a_plan_without_shared_clocks_keeps_fewer_in_flight():
    assert [make_plan().open_limit(stage) for stage in (0, 1)] == [2, 1]
    assert [make_plan(template="gpipe").open_limit(stage) for stage in (0, 1)] == [4, 4]


def test_what_has_a_default_may_be_left_out(tmp_path, content):
    for key in ("clock_s", "alignment", "theoretical_bubble_fraction", "mfu"):
        del content["predicted"][key]
    for key in ("backbone", "contention", "launches", "useful_flops", "cost_notes"):
        del content["derived"][key]
    del content["decisions"]["orchestration"]
    assert load_changed(tmp_path, content) == make_plan()


def test_an_alignment_report_is_read_back(tmp_path):
    counts = TokenCounts(all=100, effective=60.5, billed=90, ineffective=39.5)
    report = AlignmentReport(plan=counts, pad=counts, pack=counts, chunk=counts, chunk_tokens=(64, 128))
    plan = make_plan()
    predicted = plan.predicted.model_copy(update={"alignment": report})
    plan = finish_plan(changed(plan, predicted=predicted))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").predicted.alignment == report


def test_replicas_share_the_micro_batches_that_a_task_declares(tmp_path, content):
    """Task a declares 4 with micro-batches of 2; on two replicas an hTask needs no more than 2 of its own."""
    content["decisions"]["tasks"][0]["micro_batch_size"] = 2
    content["decisions"]["cluster"]["ranks"] = 4
    content["decisions"]["parallelism"]["dp"] = 2
    plan = finish_plan(Plan.model_validate(content))
    check_plan(plan)
    assert plan.parallelism.ranks == 4
    assert plan.shape(0).groups == 4
    content["decisions"]["tasks"][0]["micro_batch_size"] = 1
    with pytest.raises(
        SpecError, match=r"derived\.htasks\[0\]\.microbatches = 2: expected at least 4: a allows"
    ):
        check_plan(finish_plan(Plan.model_validate(content)))


@pytest.mark.parametrize(
    ("path", "value", "message"), FIELDS, ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_a_wrong_field_is_refused_with_file_field_and_value(tmp_path, content, path, value, message):
    set_at(content, path, value)
    with pytest.raises(SpecError) as caught:
        load_changed(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/plan.json: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    CONTRADICTIONS,
    ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_contradiction_is_refused_with_field_and_value(content, path, value, message):
    set_at(content, path, value)
    with pytest.raises(SpecError) as caught:
        check_plan(finish_plan(Plan.model_validate(content)))
    assert str(caught.value).removeprefix("plan: ").startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", [key for key in json.loads(make_plan().model_dump_json()) if key not in OPTIONAL]
)
def test_every_key_is_required(tmp_path, content, key):
    del content[key]
    with pytest.raises(SpecError, match=rf"{key} = None: expected"):
        load_changed(tmp_path, content)


def test_a_valid_plan_passes_the_check_as_an_object_too():
    check_plan(make_plan())
    assert TypeAdapter(Plan).validate_python(make_plan().model_dump()) == make_plan()


def test_shards_of_a_stage_share_a_node():
    """Their collectives are priced inside of a node, and the search proposes nothing else."""
    plan = make_plan()
    cluster = plan.cluster.model_copy(update={"ranks": 8, "nodes": 2, "between_nodes": "infiniband"})
    sharded = plan.parallelism.model_copy(update={"tp": 2})
    check_plan(finish_plan(changed(plan, cluster=cluster, parallelism=sharded)))
    thirds = cluster.model_copy(update={"ranks": 6})
    with pytest.raises(
        SpecError, match=r"parallelism.tp = 2: expected ranks of one node: a divisor of the 3"
    ):
        check_plan(changed(plan, cluster=thirds, parallelism=sharded))
