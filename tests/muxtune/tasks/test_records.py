"""Records: which lines are examples, and what is said of files that people bring instead."""

import json

import pytest

from muxtune.support.errors import UserError
from muxtune.tasks.jsonl import JsonlFile
from muxtune.tasks.records import Text, parse_line


def refusal(line: bytes) -> str:
    with pytest.raises(UserError) as caught:
        parse_line(line, "d.jsonl:7")
    message = str(caught.value)
    assert message.startswith("d.jsonl:7")
    assert "\n" not in message
    return message


def test_a_text_has_no_prompt():
    assert parse_line(b'{"text": "a"}', "d") == Text("", "a")
    assert parse_line(b'{"prompt": "a", "completion": ""}', "d") == Text("a", "")
    assert parse_line(b'{"prompt": "a", "completion": "b", "text": "c"}', "d") == Text("a", "b")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, 'the keys are "prompt": expected an object with the strings'),
        ({"prompt": "a", "completion": 3}, '"completion" is a number'),
        ({"prompt": None, "completion": "a"}, '"prompt" is null'),
        ({"text": ["a"]}, '"text" is a list'),
        ({"text": ""}, '"text" is empty'),
        ({}, "there are no keys"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "apply_chat_template(messages, tokenize=False)"),
        ({"instruction": "a", "input": "", "output": "b"}, "jq -c '{prompt: (.instruction"),
    ],
)
def test_a_wrong_record_is_told_what_it_lacks_and_the_shortest_way(record, message):
    assert message in refusal(json.dumps(record).encode())


def test_users_texts_are_not_quoted():
    secret = "do not print " * 20
    assert "do not" not in refusal(json.dumps({"prompt": secret}).encode())
    assert "do not" not in refusal(json.dumps({"prompt": secret}).encode()[:-1])
    long_keys = refusal(json.dumps({f"key {'x' * 500} {i}": 1 for i in range(100)}).encode())
    assert len(long_keys) < 400


@pytest.mark.parametrize(
    "line",
    [b'{"text": "\xff"}', rb'{"text": "\ud800"}', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}"],
    ids=["not UTF-8", "half a surrogate pair", "deep", "a number of 5000 digits"],
)
def test_what_json_cannot_hold_is_named(line):
    assert "not JSON" in refusal(line)


def test_two_keys_of_one_name_are_json(tmp_path):
    assert parse_line(b'{"text": "a", "text": "b"}', "d") == Text("", "b")


ALPACA = [{"instruction": "add", "input": "1 1", "output": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "not UTF-16 (iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "not UTF-16"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "not UTF-16"),
        ("a.json", json.dumps(ALPACA).encode(), "not an array of them (jq -c '.[] | {prompt: (.instruction"),
        ("a.json", json.dumps([{"text": "a"}], indent=1).encode(), "not an array of them (jq -c '.[]' FILE"),
        ("a.json", json.dumps({"text": "a"}, indent=1).encode(), "each object on one line (jq -c . FILE"),
        ("a.csv", b"prompt,completion\na,b\n", "not CSV (pandas.read_csv(FILE).to_json(OUT"),
        ("a.tsv", b"prompt\tcompletion\na\tb\n", 'not TSV (pandas.read_csv(FILE, sep="\\t")'),
        ("a.bin", b"PAR1\x15\x04", "not Parquet (pandas.read_parquet(FILE)"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "not gzip (gunzip FILE unpacks it)"),
    ],
)
def test_another_format_is_named_with_the_way_to_ours(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        JsonlFile(path, "tasks.t.dataset.path")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"tasks.t.dataset.path = '{path}': expected a JSONL file in UTF-8, ")


def test_the_alpaca_recipe_gives_what_is_expected():
    """What the message's jq expression makes of a record, by hand."""
    (record,) = ALPACA
    made = {"prompt": record["instruction"] + "\n" + record["input"], "completion": record["output"]}
    assert parse_line(json.dumps(made).encode(), "d") == Text("add\n1 1", "2")


def test_a_csv_suffix_on_jsonl_is_no_mistake(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'{"text": "a"}\n')
    assert len(JsonlFile(path, "field")) == 1
