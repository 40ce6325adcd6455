"""Expansion of sweep files, and what is refused in them."""

from __future__ import annotations

import pytest

from experiments.sweep.specification import load_sweep
from muxtune.support.errors import UserError
from tests.experiments.sweep.sweeps import write_sweep


def points(folder, **fields):
    return list(load_sweep(write_sweep(folder, **fields)).assignments())


def test_a_grid_is_the_product_with_its_last_field_running_fastest(tmp_path):
    found = points(tmp_path, grid={"options.pp": [1, 2], "policy": ["nemo", "muxtune"]})
    assert [list(point.values()) for point in found] == [
        [1, "nemo"],
        [1, "muxtune"],
        [2, "nemo"],
        [2, "muxtune"],
    ]


def test_the_points_of_the_list_follow_those_of_the_grid(tmp_path):
    found = points(tmp_path, grid={"policy": ["nemo"]}, list=[{"options.pp": 1}, {}])
    assert found == [{"policy": "nemo"}, {"options.pp": 1}, {}]


def test_fields_in_one_key_change_together(tmp_path):
    pairs = [["llama-tiny", "cpu-1"], ["opt-tiny", "cpu-2"]]
    found = points(tmp_path, grid={"model, cluster": pairs, "options.pp": [1, 2]})
    assert [(p["model"], p["cluster"], p["options.pp"]) for p in found] == [
        ("llama-tiny", "cpu-1", 1),
        ("llama-tiny", "cpu-1", 2),
        ("opt-tiny", "cpu-2", 1),
        ("opt-tiny", "cpu-2", 2),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "grid = None: expected fields with lists of values, or points under list"),
        ({"gird": {"policy": ["nemo"]}}, "gird"),
        ({"grid": {"policy": "nemo"}}, r"grid\.policy = 'nemo': expected a valid list"),
        ({"grid": {"policy": []}}, r"grid\.policy = \[\]: expected at least one value"),
        ({"grid": {"polcy": ["nemo"]}}, r"grid\.polcy = 'polcy': expected policy, or a field of workload"),
        ({"grid": {"policy.name": ["nemo"]}}, "expected policy alone"),
        ({"grid": {"cluster..ranks": [1]}}, r"grid\.cluster\.\.ranks: field = 'cluster\.\.ranks'"),
        ({"grid": {"model, cluster": [["llama-tiny"]]}}, "expected a list of 2 values, one per field"),
        ({"grid": {"policy": ["nemo"], "policy,cluster": [["nemo", "cpu-1"]]}}, "expected every field once"),
        ({"grid": {"options.pp": [float("nan")]}}, r"grid\.options\.pp = nan: expected numbers, texts"),
        (
            {"list": [{"policy": "nemo"}, {"nodes": 2}]},
            r"list\[1\] = 'nodes': expected policy, or a field of",
        ),
        ({"list": {"policy": "nemo"}}, "list = "),
        ({"workload": 3, "list": [{}]}, "workload"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_file_and_field(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        load_sweep(write_sweep(tmp_path, **fields))
    assert str(tmp_path / "sweep.yaml") in str(raised.value)


def test_what_is_no_sweep_file_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    with pytest.raises(UserError, match="cannot read the sweep"):
        load_sweep(path)
    path.write_text("grid: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_sweep(path)
    path.write_text("- policy")
    with pytest.raises(UserError, match="a mapping with the key grid or list"):
        load_sweep(path)
