"""Workload files: what is read, and what a wrong one is told."""

import copy

import pytest
import yaml

from muxtune.model import load_model_spec
from muxtune.support.errors import SpecError, UserError
from muxtune.tasks import Workload, load_workload, workload_from
from tests.plans import make_task

CONTENT = {
    "backbone": "llama-tiny",
    "tasks": [
        {
            "id": "sentiment",
            "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "dataset": {"path": "texts/sst2.jsonl"},
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "max_length": 64,
            "learning_rate": 1.0e-3,
            "steps": 20,
        },
        {
            "id": "other",
            "peft": {"method": "lora", "r": 2, "alpha": 1, "targets": ["all-linear"]},
            "dataset": {"lengths": "rte"},
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "max_length": 128,
            "learning_rate": 5.0e-4,
            "steps": 3,
            "seed": 9,
            "shuffle": True,
            "max_grad_norm": 1.0,
        },
    ],
}
MISSING = object()


def changed(path, value):
    """``CONTENT`` with the value at a dotted path replaced, or removed."""
    content = copy.deepcopy(CONTENT)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in parents:
        place = place[part]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return content


def write(folder, content):
    path = folder / "workload.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_file_is_read_with_its_defaults(tmp_path):
    workload = load_workload(write(tmp_path, CONTENT))
    sentiment, other = workload.tasks
    assert (workload.backbone, workload.dtype) == ("llama-tiny", None)
    assert sentiment.peft.scale("model.layers.0.self_attn.q_proj") == 2.0
    assert sentiment.declared_microbatches == 4
    assert (sentiment.seed, sentiment.shuffle, sentiment.max_grad_norm, sentiment.weight_decay) == (
        0,
        False,
        None,
        0.0,
    )
    assert sentiment.lr_schedule == "constant"
    assert (other.seed, other.shuffle, other.max_grad_norm) == (9, True, 1.0)
    workload.check(load_model_spec("llama-tiny"))


def test_dataset_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write(folder, changed("tasks.1.dataset", {"path": "../up.jsonl"}))
    expected = [folder / "texts" / "sst2.jsonl", tmp_path / "up.jsonl"]
    for here, name in [(tmp_path, "elsewhere/workload.yaml"), (folder, "workload.yaml")]:
        monkeypatch.chdir(here)
        workload = load_workload(type(folder)(name))
        assert [task.dataset.path for task in workload.tasks] == [path.resolve() for path in expected]


def test_absolute_paths_and_home_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, expected in [
        (str(tmp_path / "x.jsonl"), tmp_path / "x.jsonl"),
        ("~/x.jsonl", tmp_path / "home/x.jsonl"),
    ]:
        workload = workload_from(changed("tasks.0.dataset.path", given), "w", tmp_path / "folder")
        assert workload.tasks[0].dataset.path == expected.resolve()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("backbone", 3, "backbone = 3: expected a valid string"),
        ("dtype", "int8", "dtype = 'int8': expected 'float32', 'float64' or 'bfloat16'"),
        ("tusks", [], "tusks = []: expected no such field"),
        ("tasks", MISSING, "tasks = None: expected a value; the field is required"),
        ("tasks", [], "tasks = []: expected"),
        ("tasks", "many", "tasks = 'many': expected a valid list"),
        ("tasks.1.id", "sentiment", "expected unique task ids; 'sentiment' stands twice"),
        ("tasks.0.id", MISSING, "tasks.0.id = None: expected a value"),
        ("tasks.0.id", "a/b", "tasks.0.id = 'a/b': expected"),
        ("tasks.0.id", "../x", "tasks.0.id = '../x': expected"),
        ("tasks.0.id", "", "tasks.0.id = '': expected"),
        ("tasks.0.id", "a+b", "tasks.0.id = 'a+b': expected"),
        ("tasks.0.id", "a\n", r"tasks.0.id = 'a\n': expected"),
        ("tasks.0.peft", MISSING, "tasks.0.peft = None: expected a value"),
        ("tasks.0.peft.method", "magic", "tasks.0.peft.method = 'magic': expected a PEFT method; there are"),
        ("tasks.0.peft.rank", 4, "tasks.0.peft.rank = 4: expected no such field"),
        ("tasks.0.peft.r", 0, "tasks.0.peft.r = 0: expected greater than 0"),
        ("tasks.0.peft.r", 2.5, "tasks.0.peft.r = 2.5: expected a valid integer"),
        ("tasks.0.peft.r", MISSING, "tasks.0.peft.r = None: expected a value"),
        ("tasks.0.peft.alpha", -1, "tasks.0.peft.alpha = -1: expected greater than 0"),
        ("tasks.0.peft.alpha", float("inf"), "tasks.0.peft.alpha = inf: expected a finite number"),
        ("tasks.0.peft.targets", [], "tasks.0.peft.targets = []: expected"),
        ("tasks.0.peft.targets", 3, "tasks.0.peft.targets = 3: expected a valid list"),
        (
            "tasks.0.peft.targets",
            "q_proj",
            "tasks.0.peft.targets = 'q_proj': expected a list, as [q_proj], or all-linear",
        ),
        (
            "tasks.0.peft.targets",
            "q_proj, v_proj",
            "tasks.0.peft.targets = 'q_proj, v_proj': expected a list, as [q_proj, v_proj], or all-linear",
        ),
        (
            "tasks.0.peft.targets",
            r".*\.(q|v_proj",
            r"tasks.0.peft.targets = '.*\\.(q|v_proj': expected a regular expression (missing )",
        ),
        ("tasks.0.peft.dropout", -0.1, "tasks.0.peft.dropout = -0.1: expected greater than or equal to 0"),
        ("tasks.0.peft.dropout", 1, "tasks.0.peft.dropout = 1: expected less than 1"),
        ("tasks.0.dataset", {}, "tasks.0.dataset = {}: expected exactly one of path and lengths"),
        ("tasks.0.dataset.lengths", "rte", "expected exactly one of path and lengths"),
        ("tasks.0.dataset.file", "x", "tasks.0.dataset.file = 'x': expected no such field"),
        ("tasks.0.global_batch_size", 0, "tasks.0.global_batch_size = 0: expected greater than 0"),
        ("tasks.0.global_batch_size", "many", "tasks.0.global_batch_size = 'many': expected a valid integer"),
        ("tasks.0.micro_batch_size", -4, "tasks.0.micro_batch_size = -4: expected greater than 0"),
        ("tasks.0.max_length", 1, "tasks.0.max_length = 1: expected greater than 1"),
        ("tasks.0.learning_rate", 0, "tasks.0.learning_rate = 0: expected greater than 0"),
        ("tasks.0.learning_rate", float("nan"), "tasks.0.learning_rate = nan: expected"),
        ("tasks.0.learning_rate", float("inf"), "tasks.0.learning_rate = inf: expected a finite number"),
        (
            "tasks.0.lr_schedule",
            "step",
            "tasks.0.lr_schedule = 'step': expected 'constant', 'linear' or 'cosine'",
        ),
        ("tasks.0.warmup_steps", -1, "tasks.0.warmup_steps = -1: expected greater than or equal to 0"),
        ("tasks.0.steps", 0, "tasks.0.steps = 0: expected greater than 0"),
        ("tasks.0.seed", -1, "tasks.0.seed = -1: expected greater than or equal to 0"),
        ("tasks.0.seed", 2**63, "tasks.0.seed = 9223372036854775808: expected less than 9223372036854775808"),
        ("tasks.0.shuffle", "maybe", "tasks.0.shuffle = 'maybe': expected a valid boolean"),
        ("tasks.0.weight_decay", -0.1, "tasks.0.weight_decay = -0.1: expected greater than or equal to 0"),
        ("tasks.0.max_grad_norm", 0, "tasks.0.max_grad_norm = 0: expected greater than 0"),
        ("tasks.0.abort_grad_norm", 0, "tasks.0.abort_grad_norm = 0: expected greater than 0"),
        ("tasks.0.learning_rat", 1, "tasks.0.learning_rat = 1: expected no such field"),
    ],
)
def test_a_wrong_field_is_named_with_file_value_and_expectation(tmp_path, path, value, message):
    file = write(tmp_path, changed(path, value))
    with pytest.raises(SpecError) as caught:
        load_workload(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 10},
            "tasks.t.micro_batch_size = 4: expected a divisor of global_batch_size (10)",
        ),
        (
            {"global_batch_size": 2},
            "tasks.t.micro_batch_size = 4: expected a divisor of global_batch_size (2)",
        ),
        (
            {"max_length": 1025},
            "tasks.t.max_length = 1025: expected at most 1024, the position limit of llama-tiny",
        ),
        (
            {"peft": {"method": "lora", "r": 129, "alpha": 1, "targets": ["q_proj", "k_proj"]}},
            "tasks.t.peft.r = 129: expected at most 128, the smallest side of its linears in llama-tiny",
        ),
        (
            {"peft": {"method": "lora", "r": 4, "alpha": 1, "targets": ["all-linear", "q_proj"]}},
            "tasks.t.peft.targets = 'all-linear': expected a linear of llama-tiny: q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj, or all-linear alone",
        ),
        (
            {"peft": {"method": "lora", "r": 4, "alpha": 1, "targets": [".*_proj"]}},
            "tasks.t.peft.targets = '.*_proj': expected a linear of llama-tiny: q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj, or all-linear alone (names; a regular expression "
            "stands alone, as text)",
        ),
        (
            {"peft": {"method": "lora", "r": 4, "alpha": 1, "targets": ["q_proj,v_proj"]}},
            "tasks.t.peft.targets = 'q_proj,v_proj': expected a linear of llama-tiny: q_proj",
        ),
        (
            {"peft": {"method": "lora", "r": 4, "alpha": 1, "targets": ["c_attn"]}},
            "tasks.t.peft.targets = 'c_attn': expected a linear of llama-tiny: q_proj",
        ),
    ],
)
def test_what_the_backbone_cannot_run_is_refused(changes, message):
    with pytest.raises(SpecError) as caught:
        Workload(tasks=(make_task("t", **changes),)).check(load_model_spec("llama-tiny"))
    assert str(caught.value).startswith(message)


def test_the_limits_themselves_are_allowed():
    peft = {"method": "lora", "r": 128, "alpha": 1, "targets": ["q_proj"]}
    make_task("t", max_length=1024, peft=peft).check(load_model_spec("llama-tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 1_000_000}, "tasks.t.micro_batch_size = 4: expected at least 245"),
        (
            {"global_batch_size": 8192, "micro_batch_size": 8192},
            "tasks.t.micro_batch_size = 8192: expected at most 4096 sequences",
        ),
        (
            {"steps": 1_000_000, "shuffle": True},
            "tasks.t.steps = 1000000: expected at most 262144 with shuffle",
        ),
    ],
)
def test_what_no_plan_could_look_at_in_seconds_is_refused(changes, message):
    with pytest.raises(SpecError) as caught:
        make_task("t", **changes).check(load_model_spec("llama-tiny"))
    assert str(caught.value).startswith(message)
    make_task("t", global_batch_size=4096, micro_batch_size=1).check(load_model_spec("llama-tiny"))
    make_task("t", steps=262_144, shuffle=True).check(load_model_spec("llama-tiny"))
    make_task("t", steps=10**7).check(load_model_spec("llama-tiny"))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"path": "a", "bos": "yes"}, "tasks.0.dataset.bos = 'yes': expected 'auto', 'always' or 'never'"),
        ({"path": "a", "allow_special": "maybe"}, "tasks.0.dataset.allow_special = 'maybe': expected"),
        ({"lengths": "sst2", "bos": "never"}, "expected bos and allow_special beside path alone"),
        ({"lengths": "sst2", "allow_special": False}, "expected bos and allow_special beside path alone"),
    ],
)
def test_rules_of_texts_are_checked(tmp_path, dataset, message):
    with pytest.raises(SpecError) as caught:
        load_workload(write(tmp_path, changed("tasks.0.dataset", dataset)))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "- 1", "3", "tasks"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    with pytest.raises(SpecError, match="expected a mapping with the key tasks"):
        load_workload(write(tmp_path, content))


@pytest.mark.parametrize(
    "content", [b"tasks: [", b"a: b: c", b"\xff\xfe\x00", b"a: !!python/object:os.system {}"]
)
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "workload.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not YAML") as caught:
        load_workload(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the workload .*none\.yaml: No such file or directory"):
        load_workload(tmp_path / "none.yaml")


@pytest.mark.parametrize("targets", ["all-linear", " all-linear ", ["all-linear"]])
def test_all_linear_may_be_written_as_text(tmp_path, targets):
    workload = load_workload(write(tmp_path, changed("tasks.0.peft.targets", targets)))
    assert workload.tasks[0].peft.targets == ("all-linear",)
