"""YAML of users: every key once, numbers as people write them, nothing that hangs."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.support.errors import UserError
from muxtune.support.yaml_file import MOST_DEPTH, load_yaml


@pytest.fixture
def read(tmp_path):
    def load(text: str | bytes):
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_yaml(path, "the workload")

    return load


CORE = [  # as YAML 1.2 has it, section 10.3.2, but for numbers with a zero in front
    ("null", None), ("~", None), ("", None), ("NULL", None), ("nil", "nil"),
    ("true", True), ("False", False), ("TRUE", True), ("tRue", "tRue"),
    ("yes", "yes"), ("NO", "NO"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("n", "n"),
    ("6", 6), ("+5", 5), ("-0", 0), ("0x10", 16), ("0o10", 8), ("0b11", "0b11"), ("-0x10", "-0x10"),
    ("010", "010"), ("-07", "-07"), ("00", "00"), ("00.5", "00.5"), ("09e1", "09e1"), ("0.5", 0.5),
    ("1_000", "1_000"), ("1_0.5", "1_0.5"), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
    ("6.0", 6.0), (".5", 0.5), ("5.", 5.0), ("-.5e1", -5), ("1.e3", 1000), (".", "."), ("+", "+"),
    ("80e9", 80_000_000_000), ("1.5e9", 1_500_000_000), ("-2E+3", -2000), ("+1e0", 1), ("1e-5", 1e-5),
    ("80e9x", "80e9x"), ("e9", "e9"), ("1e", "1e"), ("'80e9'", "80e9"), ('"6"', "6"), ("1e5-a", "1e5-a"),
    ("0x1e5", 0x1E5), ("1e30", 1e30), (".inf", math.inf), ("-.INF", -math.inf), ("inf", "inf"),
    ("2024-01-01", "2024-01-01"), ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"), ("2026-13-01",) * 2,
    ("=", "="), ("1.2.3", "1.2.3"), ("12e03", 12_000), ("!!int 0x10", 16), ("!!str 6", "6"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), CORE)
def test_plain_values_mean_what_yaml_1_2_says(read, text, value):
    found = read(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_a_value_may_be_no_number_at_all(read):
    assert math.isnan(read("a: .nan")["a"])
    assert read("- .NaN-1") == [".NaN-1"]


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_what_json_writes_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(json.dumps(value).replace("Infinity", ".inf"))
    found = load_yaml(path, "the workload")
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


def test_infinity_is_read_for_the_field_to_refuse(read):
    assert read("[.inf, 1e400]") == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a", 1),
        ("tasks:\n- id: x\n  max_length: 64\n  max_length: 4096", 4, "max_length", 3),
        ("grid: {policy: [nemo], policy: [muxtune]}", 1, "policy", 1),
        ("a: 1\n'a': 2", 2, "a", 1),
        ("1: a\n1.0: b", 2, "1.0", 1),
        ("<<: {a: 1}\n<<: {a: 2}", 2, "<<", 1),
        ("- &x {a: 1}\n- {b: *x, b: *x}", 2, "b", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(read, text, line, key, first):
    with pytest.raises(UserError) as caught:
        read(text)
    expected = (
        f"line {line}: the key {key} stands in one mapping twice, first in line {first}: expected every"
    )
    assert expected in str(caught.value)


def test_a_merged_key_may_be_set_again(read):
    text = "base: &b {x: 1, y: 1}\nd: &d {<<: *b, x: 2}\ne: {<<: *d, x: 4}\nf: {<<: [*b, *d]}"
    content = read(text)
    assert content["d"] == {"x": 2, "y": 1}
    assert content["e"] == {"x": 4, "y": 1}
    assert content["f"] == {"x": 1, "y": 1}


def bomb(depth: int, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


def merge_bomb(depth: int, width: int = 9) -> str:
    merged = (f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, depth))
    return "\n".join(["a0: &a0 {x: 1}", *merged])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(9), "line 7: more than 1,000,000 values, with aliases written out"),
        (bomb(60), "more than 1,000,000 values"),
        (merge_bomb(9), "more than 1,000,000 values"),
        ("[" * 20_000, f"line 1: more than {MOST_DEPTH} levels"),
        ("- " * 20_000 + "x", f"line 1: more than {MOST_DEPTH} levels"),
        ("{a: " * 5_000, f"line 1: more than {MOST_DEPTH} levels"),
        ("a: &a [*a]", "line 1: a value that contains itself"),
        ("a: &a\n  b: *a", "line 2: a value that contains itself"),
        ("a:\n  " + "9" * 5_000, "line 2: '9999"),
        ("a: !!int x", "line 1: 'x': expected a value of type int"),
        ("a: !!int 1_000", "line 1: '1_000': expected a value of type int"),
        ("a: !!int 010", "line 1: '010': expected a value of type int"),
        ("a: !!float 1:30", "line 1: '1:30': expected a value of type float"),
        ("a: !!bool x", "line 1: 'x': expected a value of type bool"),
        ("a: !!bool yes", "line 1: 'yes': expected a value of type bool"),
        ("a: !!timestamp x", "line 1: 'x': expected a value of type timestamp"),
        ("? [a]\n: 1", "is not YAML: line 1: while constructing a mapping, found unhashable key"),
        ("a: [", "is not YAML: line 1: while parsing a flow node, expected the node content"),
        ("a: !!python/object:os.system {}", "is not YAML: line 1: could not determine a constructor"),
        ("a: \x1b[31m", "is not YAML: unacceptable character"),
        ("a: 1\0", "is not YAML: unacceptable character"),
        (b"\xff\xfe\x00", "is not YAML: 'utf-8' codec can't decode"),
        ("--- 1\n--- 2", "is not YAML: line 2: expected a single document"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_what_is_no_small_tree_of_values_is_refused_in_one_line(read, text, reason):
    with pytest.raises(UserError) as caught:
        read(text)
    assert reason in str(caught.value)
    assert "x.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_repeated_alias_is_no_bomb(read):
    assert read(bomb(4))["a3"][0][0][0] == ["x"] * 9
    assert read("[" * MOST_DEPTH + "]" * MOST_DEPTH) is not None


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "fifo", ".", "missing", "nul\0"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(
        UserError, match=r"cannot read the workload .*: (expected a regular|Is a dir|No such|a NUL)"
    ):
        load_yaml(tmp_path / name, "the workload")


def test_a_file_without_end_is_refused(tmp_path):
    path = tmp_path / "sparse.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has more than 16 MiB"):
        load_yaml(path, "the workload")
