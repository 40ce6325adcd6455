"""Datasets: which tokens a step takes, in torch's own order, and what a wrong file is told."""

import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.data.histograms import load_length_histogram
from muxtune.model import PRESETS
from muxtune.support.errors import UserError
from muxtune.tasks import DatasetSpec, Example, TaskData, load_task_data, with_digest
from muxtune.tasks.dataset import HISTOGRAM_EXAMPLES
from muxtune.tasks.order import epoch_orders
from muxtune.tasks.tokenizer import ByteTokenizer
from tests.muxtune.tasks.sequences import BOS, EOS, ControlTokenizer, NoBosTokenizer, make_example, text
from tests.plans import make_task
from tests.sampling import examples

MODEL = PRESETS["llama-tiny"]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path, **changes):
    return load_task_data(make_task("t", dataset={"path": str(path)}, **changes), MODEL)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("n", [1, 2, 3, 37, 1000])
def test_epochs_are_the_permutations_of_one_torch_generator(seed, n):
    generator = torch.Generator().manual_seed(seed)
    for order in islice(epoch_orders(n, seed, shuffle=True), 4):
        np.testing.assert_array_equal(order, torch.randperm(n, generator=generator).numpy())


def test_a_large_epoch_is_torchs_too():
    expected = torch.randperm(70_000, generator=torch.Generator().manual_seed(3)).numpy()
    np.testing.assert_array_equal(next(epoch_orders(70_000, 3, shuffle=True)), expected)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**63 - 1))
@settings(max_examples=examples(100))
def test_steps_take_the_next_examples_and_wrap_at_the_end_of_an_epoch(n, batch, steps, shuffle, seed):
    task = make_task(
        "t", global_batch_size=batch, micro_batch_size=1, steps=steps, shuffle=shuffle, seed=seed
    )
    data = TaskData(task, [Example(np.full(i + 1, i, dtype=np.int64), 1) for i in range(n)])
    generator = torch.Generator().manual_seed(seed)
    expected = []
    while len(expected) < batch * steps:
        expected += (torch.randperm(n, generator=generator) if shuffle else torch.arange(n)).tolist()
    for step in range(steps):
        indices = expected[step * batch : (step + 1) * batch]
        assert [int(example.tokens[0]) for example in data.batch(step)] == indices
        assert data.batch_lengths(step).tolist() == [i + 1 for i in indices]
    assert data.order(steps).tolist() == expected[: batch * steps]
    assert data.order(steps + 3)[: batch * steps].tolist() == expected[: batch * steps]


def test_a_tiny_dataset_and_many_steps_take_linear_time():
    task = make_task("t", global_batch_size=16, steps=5000)
    data = TaskData(task, [Example(np.zeros(3, dtype=np.int64), 1)])
    assert data.order(5000).tolist() == [0] * 80_000  # quadratic, this takes half a minute


def test_lines_are_read_in_file_order_and_blank_ones_are_skipped(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b", "source": "sst"}\r\n\n   \n{"text": "\xc3\xbc"}\n{"text": "c"}'
    )
    data = load(path)
    assert [text(example) for example in data.examples] == ["<ab>", "<\xc3\xbc>", "<c>"]
    assert data.lengths.tolist() == [4, 4, 3]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')
    assert len(load(path).examples) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"hello", "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (rb'{"text": "\ud800"}', "not JSON"),
        (b"3", "= 3: expected an object"),
        (b'["a"]', r"= \['a'\]: expected an object"),
        (b'{"prompt": "a"}', "expected an object with the strings"),
        (b'{"prompt": "a", "completion": 3}', "expected an object with the strings"),
        (b'{"text": ""}', "expected an object with the strings"),
        (b'{"text": null}', "expected an object with the strings"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_examples_is_refused(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tasks\.t\.dataset\.path = .*: expected at least one example"):
        load(path)


def test_a_missing_file_is_refused_with_the_task_and_the_path(tmp_path):
    with pytest.raises(
        UserError, match=r"tasks\.t\.dataset\.path = '.*none\.jsonl': expected a readable JSONL file"
    ):
        load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"Is a directory"):
        load(tmp_path)


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "a"})
    planned = with_digest(DatasetSpec(path=path))
    assert planned.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    task = make_task("t", dataset=planned)
    assert len(load_task_data(task, MODEL).examples) == 1
    write_lines(path, {"text": "a"}, {"text": "b"})
    with pytest.raises(
        UserError, match=rf"expected the file that the plan was made for \(sha256 {planned.sha256[:12]}"
    ):
        load_task_data(task, MODEL)


def test_a_digest_needs_the_file(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.path = .*: expected a readable JSONL file"):
        with_digest(DatasetSpec(path=tmp_path / "none.jsonl"))
    drawn = DatasetSpec(lengths="rte")
    assert with_digest(drawn) is drawn


@pytest.mark.parametrize("name", ["sst2", "openbookqa", "rte"])
def test_drawn_examples_have_the_lengths_of_their_dataset_up_to_max_length(name):
    data = load_task_data(make_task("t", dataset={"lengths": name}, max_length=48), MODEL)
    known = set(np.minimum(load_length_histogram(name).lengths, 48).tolist())
    assert len(data.examples) == HISTOGRAM_EXAMPLES
    assert set(data.lengths.tolist()) <= known
    tokens = np.concatenate([example.tokens for example in data.examples])
    assert tokens.min() >= 0
    assert tokens.max() < MODEL.vocab
    assert {example.target_tokens for example in data.examples} == {2}  # a label and EOS


def test_drawn_examples_depend_on_the_seed_alone():
    def tokens(seed):
        data = load_task_data(make_task("t", seed=seed), MODEL)
        return np.concatenate([example.tokens for example in data.examples])

    np.testing.assert_array_equal(tokens(2**40), tokens(2**40))
    assert not np.array_equal(tokens(1)[:100], tokens(2)[:100])


def test_a_very_short_drawn_example_still_has_a_target():
    data = load_task_data(make_task("t", max_length=2), MODEL)
    assert {(len(example.tokens), example.target_tokens) for example in data.examples} == {(2, 1)}


def test_drawn_tokens_are_those_of_one_example_after_the_other():
    data = load_task_data(make_task("t", dataset={"lengths": "sst2"}, seed=11, max_length=32), MODEL)
    generator = np.random.default_rng(11)
    lengths = np.minimum(load_length_histogram("sst2").sample(generator, HISTOGRAM_EXAMPLES), 32)
    np.testing.assert_array_equal(data.lengths, lengths)  # before any token is drawn
    np.testing.assert_array_equal(data.targets, [example.target_tokens for example in data.examples])
    for example, length in zip(data.examples, lengths, strict=True):
        expected = generator.integers(0, MODEL.vocab, size=length, dtype=np.int64)
        np.testing.assert_array_equal(example.tokens, expected)
    assert [len(example.tokens) for example in data.examples[:5]] == lengths[:5].tolist()


def test_indices_of_several_steps_are_those_of_each():
    data = load_task_data(make_task("t", dataset={"lengths": "rte"}, steps=9), MODEL)
    many = data.step_indices(np.array([0, 4, 8]))
    for row, step in zip(many, (0, 4, 8), strict=True):
        np.testing.assert_array_equal(row, data.step_indices(step))
        np.testing.assert_array_equal(data.lengths[row], data.batch_lengths(step))


def test_only_the_lines_that_steps_take_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "{"x" * i}"}}\n' for i in range(1, 7)) + "nonsense\n")
    data = load(path, global_batch_size=2, micro_batch_size=1, steps=3)
    assert data.lengths.tolist() == [3, 4, 5, 6, 7, 8, 0]
    assert data.targets.tolist() == [2, 3, 4, 5, 6, 7, 0]
    assert (data.longest, data.mean_length, data.step_tokens) == (8, 5.5, 11.0)
    with pytest.raises(UserError, match=r"d\.jsonl:7: not JSON"):
        load(path, global_batch_size=2, micro_batch_size=1, steps=4)
    # shuffled, the last line may be among the first ones
    seeds = [seed for seed in range(20) if 6 in torch.randperm(7, generator=torch.manual_seed(seed))[:2]]
    for seed in range(20):
        fields = {"global_batch_size": 2, "micro_batch_size": 1, "steps": 1, "shuffle": True, "seed": seed}
        if seed in seeds:
            with pytest.raises(UserError, match="not JSON"):
                load(path, **fields)
        else:
            assert sorted(load(path, **fields).lengths)[:5] == [0] * 5


@given(
    st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1, max_size=6),
    st.integers(2, 12),
    st.booleans(),
)
@settings(max_examples=examples(60))
def test_lengths_before_tokens_are_those_of_the_examples(tmp_path_factory, pairs, max_length, bos):
    path = write_lines(
        tmp_path_factory.mktemp("data") / "d.jsonl",
        *({"prompt": prompt, "completion": completion} for prompt, completion in pairs),
    )
    tokenizer = ByteTokenizer() if bos else NoBosTokenizer()
    data = load_task_data(
        make_task("t", dataset={"path": str(path)}, max_length=max_length), MODEL, tokenizer
    )
    for i, (prompt, completion) in enumerate(pairs):
        expected = make_example(prompt, completion, tokenizer, max_length)
        assert data.examples[i].tokens.tolist() == expected.tokens.tolist()
        assert data.examples[i].target_start == expected.target_start
        assert (data.lengths[i], data.targets[i]) == (len(expected.tokens), expected.target_tokens)
    assert len(data.examples[:]) == len(list(data.examples)) == len(pairs)


RENDERED = [
    # prompt, completion, adds_bos, rule, tokens, target_start
    ("<ab", "cd>", True, "auto", "<abcd>", 3),
    ("<ab", "cd", True, "auto", "<abcd>", 3),
    ("ab", "cd>", True, "auto", "<abcd>", 3),
    ("<ab", "cd>", False, "auto", "<abcd>", 3),
    ("ab", "cd>", False, "auto", "abcd>", 2),
    ("ab", "cd", False, "always", "<abcd>", 3),
    ("<ab", "cd>", False, "always", "<abcd>", 3),
    ("<ab", "cd>", True, "never", "<abcd>", 3),
    ("ab", "cd", True, "never", "abcd>", 2),
    ("<<ab", "cd>>", True, "auto", "<<abcd>>", 4),  # two of its own are the text's business
    ("", "<cd>", True, "auto", "<cd>", 1),
    ("", "<", True, "auto", "<>", 1),
    ("", "<>", True, "auto", "<>", 1),
    ("", ">", True, "auto", "<>", 1),
    ("a", "<c", True, "auto", "<a<c>", 2),  # BOS in the middle is no beginning
    ("a>", "", True, "auto", "<a>>", 3),  # EOS of the prompt is no end
]


@pytest.mark.parametrize(("prompt", "completion", "adds", "rule", "tokens", "target_start"), RENDERED)
def test_bos_and_eos_stand_once(tmp_path, prompt, completion, adds, rule, tokens, target_start):
    tokenizer = ControlTokenizer(adds_bos=adds)
    example = make_example(prompt, completion, tokenizer, 64, bos=rule)
    assert (text(example), example.target_start) == (tokens, target_start)
    path = write_lines(tmp_path / "d.jsonl", {"prompt": prompt, "completion": completion})
    task = make_task("t", dataset={"path": str(path), "bos": rule})
    data = load_task_data(task, MODEL, tokenizer)
    assert text(data.examples[0]) == tokens
    assert data.examples[0].target_start == target_start
    assert (data.lengths[0], data.targets[0]) == (len(tokens), len(tokens) - target_start)


def test_control_tokens_in_texts_are_characters_if_they_are_not_allowed(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "<a", "completion": "b>"})
    task = make_task("t", dataset={"path": str(path), "allow_special": False})
    (example,) = load_task_data(task, MODEL, ControlTokenizer()).examples
    assert example.tokens.tolist() == [BOS, ord("<"), ord("a"), ord("b"), ord(">"), EOS]
    assert example.target_start == 3


def test_bos_that_a_tokenizer_does_not_have_cannot_be_asked_for(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "a"})
    task = make_task("t", dataset={"path": str(path), "bos": "always"})
    with pytest.raises(UserError, match=r"tasks\.t\.dataset\.bos = 'always': expected auto or never"):
        load_task_data(task, MODEL, NoBosTokenizer())


def test_texts_that_bring_bos_or_eos_are_mentioned_once(tmp_path, caplog):
    path = write_lines(tmp_path / "d.jsonl", {"text": "<a>"}, {"text": "b>"}, {"text": "c"})
    for id_ in ("t", "u"):
        task = make_task(id_, dataset={"path": str(path)})
        load_task_data(task, MODEL, ControlTokenizer())
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path}: of 3 texts 1 begin with BOS and 2 end with EOS already, which is not put twice"
    )
    plain = write_lines(tmp_path / "e.jsonl", {"text": "a"})
    load_task_data(make_task("t", dataset={"path": str(plain)}), MODEL, ControlTokenizer())
    assert len(caplog.records) == 1
