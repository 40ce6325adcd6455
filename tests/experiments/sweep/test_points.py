"""From a point's fields to what is planned."""

from __future__ import annotations

import pytest
import yaml

from experiments.sweep.points import build_points
from experiments.sweep.specification import load_sweep
from experiments.workloads import random_workload
from muxtune.support.errors import UserError
from tests.experiments.sweep.sweeps import BASE, task, write_sweep


def build(folder, *points, costs_digest="", **fields):
    path = write_sweep(folder, list=list(points), **fields)
    return build_points(load_sweep(path), path, costs_digest)


def inputs(folder, point, **fields):
    (only,) = build(folder, point, **fields)
    assert only.inputs is not None, only.refused
    return only.inputs


def test_fields_of_everything_reach_the_inputs(tmp_path):
    found = inputs(
        tmp_path,
        {
            "policy": "nemo",
            "options.template": "flush",
            "cluster.device.memory_bytes": 123,
            "model.layers": 6,
            "workload.dtype": "float64",
            "workload.tasks[*].steps": 7,
            "workload.tasks[b].peft.r": 2,
            "workload.tasks[0].micro_batch_size": 8,
        },
    )
    first, second = found.workload.tasks
    assert (found.policy, found.options.template) == ("nemo", "flush")
    assert (found.cluster.ranks, found.cluster.device.memory_bytes) == (2, 123)
    assert (found.model.name, found.model.layers, found.model.dtype) == ("llama-tiny", 6, "float64")
    assert (first.steps, first.peft.r, first.micro_batch_size) == (7, 4, 8)
    assert (second.steps, second.peft.r, second.micro_batch_size) == (7, 2, 4)


def test_a_whole_is_set_before_its_fields_whichever_stands_first(tmp_path):
    found = inputs(
        tmp_path,
        {"cluster.ranks": 5, "cluster": "cpu-1", "model.layers": 2, "model": "opt-tiny"},
        workload={"tasks": [task(peft={"method": "lora", "r": 2, "alpha": 2, "targets": ["fc1"]})]},
    )
    assert (found.cluster.name, found.cluster.ranks) == ("cpu-1", 5)
    assert (found.model.name, found.model.layers) == ("opt-tiny", 2)


def test_count_repeats_the_tasks_with_ids_and_seeds_of_their_own(tmp_path):
    found = inputs(tmp_path, {"workload.count": 5, "workload.tasks[b.1].steps": 3})
    assert [(t.id, t.seed, t.steps) for t in found.workload.tasks] == [
        ("a", 0, 2),
        ("b", 0, 2),
        ("a.1", 1, 2),
        ("b.1", 1, 3),
        ("a.2", 2, 2),
    ]
    assert [t.id for t in inputs(tmp_path, {"workload.count": 1}).workload.tasks] == ["a"]


def test_random_draws_the_workload_of_a_seed(tmp_path):
    drawn = inputs(tmp_path, {"workload.random": 4, "workload.count": 3}, workload={"dtype": "float64"})
    assert drawn.workload.tasks == random_workload(4, tasks=3).tasks
    assert drawn.model.dtype == "float64"
    whole = inputs(tmp_path, {"workload": {"random": 5}})
    assert whole.workload.tasks == random_workload(5).tasks


def test_paths_are_taken_from_the_folder_of_the_sweep_file(tmp_path, monkeypatch):
    folder = tmp_path / "sweeps"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "data.jsonl").write_text('{"text": "hello"}\n')
    tasks = [task(dataset={"path": "data.jsonl"})]
    (folder / "w.yaml").write_text(yaml.safe_dump({"backbone": "llama-tiny", "tasks": tasks}))
    cluster = inputs(folder, {}).cluster
    (folder / "c.yaml").write_text(yaml.safe_dump(cluster.model_dump() | {"name": "mine"}))
    found = inputs(folder, {"workload": "w.yaml", "cluster": "c.yaml"})
    assert found.workload.tasks[0].dataset.path == folder / "data.jsonl"
    assert found.cluster.name == "mine"


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            {"workload.tasks[*].micro_batchsize": 2},
            r"workload: tasks\.0\.micro_batchsize = 2: expected no such",
        ),
        ({"workload.tasks[*].steps": "two"}, r"workload: tasks\.0\.steps = 'two'"),
        ({"workload.random": 3}, r"workload\.random = 3: expected nothing: the workload has tasks"),
        ({"workload.tasks[*].steps": True}, r"workload: tasks\.0\.steps = True: expected a valid integer"),
        ({"workload.tasks[*].steps": "6"}, r"workload: tasks\.0\.steps = '6': expected a valid integer"),
        ({"workload.tasks[*].peft.r": 4.0}, r"workload: tasks\.0\.peft\.r = 4\.0: expected a valid integer"),
        ({"workload.tasks[*].shuffle": 1}, r"workload: tasks\.0\.shuffle = 1: expected a valid boolean"),
        ({"workload.count": True}, r"workload\.count = True: expected an integer, at least 1"),
        ({"model.layers": "4"}, r"model: layers = '4': expected a valid integer"),
        ({"cluster.ranks": 2.0}, r"cluster: ranks = 2\.0: expected a valid integer"),
        ({"options.pp": "2"}, r"options: pp = '2': expected a valid integer"),
        ({"options.tp": True}, r"options: tp = True: expected a valid integer"),
        ({"workload.count": 0}, r"workload\.count = 0: expected an integer, at least 1"),
        ({"workload": {"random": "x"}}, r"workload\.random = 'x': expected an integer"),
        ({"workload": None}, "workload = None: expected a workload file"),
        ({"workload": "missing.yaml"}, "cannot read the workload"),
        ({"workload.tasks[*].dataset": {"path": "missing.jsonl"}}, "expected a readable JSONL file"),
        ({"model.leyers": 3}, r"model: leyers = 3: expected no such field"),
        ({"model": "llama-huge"}, "no model preset or directory named 'llama-huge'"),
        ({"cluster.ranks": "many"}, r"cluster: ranks = 'many'"),
        ({"cluster": None}, "cluster = None: expected a preset"),
        ({"cluster": "cpu"}, "no cluster named"),
        ({"policy": "muxtuna"}, "did you mean 'muxtune'"),
        ({"policy": 3}, "policy = 3: expected one of"),
        ({"options.tempalte": "flush"}, "no option named 'tempalte'; did you mean 'template'"),
        ({"options.template": "drain"}, r"options: template = 'drain'"),
        ({"options": 3}, "options = 3: expected a mapping"),
    ],
    ids=str,
)
def test_a_value_that_is_wrong_everywhere_is_the_users_mistake(tmp_path, point, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, {}, point)


def test_fields_that_do_not_go_together_refuse_a_point_only(tmp_path):
    points = build(
        tmp_path,
        {"cluster.nodes": 2, "cluster.between_nodes": "infiniband"},
        {"cluster.nodes": 2, "cluster.between_nodes": "infiniband", "cluster.ranks": 3},
        {"workload.count": 1, "workload.tasks[1].steps": 3},
    )
    assert [point.inputs is None for point in points] == [False, True, True]
    assert "expected a divisor of the 3 ranks" in str(points[1].refused)
    assert "expected an id, or a position below 1" in str(points[2].refused)


def test_if_no_point_can_be_the_file_is_wrong(tmp_path):
    with pytest.raises(UserError, match="expected a divisor of the 3 ranks"):
        build(tmp_path, {"cluster.nodes": 2, "cluster.between_nodes": "infiniband", "cluster.ranks": 3})


def test_a_digest_tells_points_apart_by_what_is_planned(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "hello"}\n')
    own = {"workload.tasks[*].dataset": {"path": "data.jsonl"}}
    same, named, costs, read = (
        build(tmp_path, {}, {"policy": "muxtune"}),
        build(tmp_path, {"policy": "nemo"}),
        build(tmp_path, {}, costs_digest="other"),
        build(tmp_path, own),
    )
    assert same[0].digest == same[1].digest == build(tmp_path, {})[0].digest
    data.write_text('{"text": "hello again"}\n')
    others = [named[0], costs[0], read[0], build(tmp_path, own)[0]]
    assert len({same[0].digest, *(point.digest for point in others)}) == 5


def test_the_base_is_not_changed_by_its_points(tmp_path):
    before = yaml.safe_dump(BASE)
    first, second = build(tmp_path, {"workload.tasks[*].steps": 9}, {})
    assert (first.inputs.workload.tasks[0].steps, second.inputs.workload.tasks[0].steps) == (9, 2)
    assert yaml.safe_dump(BASE) == before
