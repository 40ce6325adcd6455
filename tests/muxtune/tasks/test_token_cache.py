"""Tokens that are kept: the same as made anew, whatever was asked before and whatever became of the file."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.tasks import token_cache
from muxtune.tasks.jsonl import JsonlFile
from muxtune.tasks.token_cache import TokenizedFile
from muxtune.tasks.tokenizer import ByteTokenizer

N = 40


class CountingTokenizer(ByteTokenizer):
    """Counts the texts that it is given."""

    def __init__(self, digest="bytes"):
        self.texts = 0
        self.digest = digest

    def encode_batch(self, texts, *, allow_special=True):
        self.texts += len(texts)
        return super().encode_batch(texts, allow_special=allow_special)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [f'{{"prompt": "{"p" * (i % 5)}", "completion": "{"c" * (i % 3)}{i}"}}\n' for i in range(N)]
    path.write_text("".join(rows))
    return JsonlFile(path, "field")


@pytest.fixture(autouse=True)
def _small_files_are_kept(monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH_EXAMPLES", 1)
    monkeypatch.setattr(token_cache, "_BATCH", 7)


def opened(lines, folder, tokenizer=None, *, allow_special=True):
    tokenizer = tokenizer or ByteTokenizer()
    return TokenizedFile(lines, tokenizer, allow_special=allow_special, folder=folder)


def check(source, positions):
    """Tokens and measures of these examples are those of their texts."""
    positions = np.array(sorted(positions))
    texts = source.texts(positions)
    assert texts.positions.tolist() == positions.tolist()
    for row, i in enumerate(positions.tolist()):
        prompt, completion = "p" * (i % 5), "c" * (i % 3) + str(i)
        head, tail = source.ids(i)
        assert bytes(head.tolist()).decode() == prompt
        assert bytes(tail.tolist()).decode() == completion
        assert (texts.prompt[row], texts.completion[row]) == (len(head), len(tail))
        assert texts.first[row] == ord((prompt + completion)[0])
        assert texts.last[row] == ord(completion[-1])


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, N - 1), min_size=1)), min_size=1, max_size=5))
def test_tokens_do_not_depend_on_what_was_asked_before(tmp_path_factory, asked):
    folder = tmp_path_factory.mktemp("cache")
    path = folder / "d.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{"p" * (i % 5)}", "completion": "{"c" * (i % 3)}{i}"}}\n' for i in range(N))
    )
    lines = JsonlFile(path, "field")
    source = opened(lines, folder)
    for fresh, positions in asked:
        if fresh:
            source = opened(lines, folder)
        check(source, positions)


def test_what_one_process_has_tokenized_no_other_tokenizes_again(lines, tmp_path):
    first, second = CountingTokenizer(), CountingTokenizer()
    check(opened(lines, tmp_path / "cache", first), range(20))
    check(opened(lines, tmp_path / "cache", second), range(5, 20))
    assert first.texts == 2 * 20
    assert second.texts == 0
    check(opened(lines, tmp_path / "cache", second), range(10, 25))
    assert second.texts == 2 * 5
    check(opened(lines, tmp_path / "cache", first), range(25))
    assert first.texts == 2 * 20


def test_other_contents_tokenizers_and_options_have_entries_of_their_own(lines, tmp_path):
    folder = tmp_path / "cache"
    check(opened(lines, folder), [0])
    check(opened(lines, folder, CountingTokenizer("other")), [0])
    check(opened(lines, folder, allow_special=False), [0])
    path = tmp_path / "e.jsonl"
    path.write_bytes(lines.path.read_bytes() + b"\n")
    check(opened(JsonlFile(path, "field"), folder), [0])
    assert len(list(folder.iterdir())) == 4


def test_a_damaged_entry_is_noticed_and_made_anew(lines, tmp_path):
    folder = tmp_path / "cache"
    check(opened(lines, folder), range(N))
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        entry.write_bytes(damaged)
        check(opened(lines, folder), range(N))
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        entry.write_bytes(whole[:size])
        check(opened(lines, folder), range(N))
    assert entry.read_bytes() == whole


def test_an_entry_that_vanishes_under_a_reader_is_made_again(lines, tmp_path):
    folder = tmp_path / "cache"
    check(opened(lines, folder), range(10))
    source = opened(lines, folder)
    source.texts(np.arange(10))  # their lengths are known now, their tokens are not
    for entry in folder.iterdir():
        entry.unlink()
    check(source, range(12))


def test_a_folder_that_cannot_be_written_costs_time_alone(lines, tmp_path):
    (tmp_path / "file").write_text("in the way")
    check(opened(lines, tmp_path / "file"), range(N))
    check(opened(lines, None), range(N))


def test_the_folder_keeps_its_size_and_what_was_used_last(lines, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    for number in range(4):
        check(opened(lines, folder, CountingTokenizer(f"{number}")), range(N))
        for age, entry in enumerate(sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)):
            os.utime(entry, (1e9 - 100 * age, 1e9 - 100 * age))
    entry_bytes = next(folder.iterdir()).stat().st_size
    used = CountingTokenizer("0")
    check(opened(lines, folder, used), range(N))  # the oldest becomes the newest
    monkeypatch.setattr(token_cache, "CACHE_BYTES", int(2.5 * entry_bytes))
    check(opened(lines, folder, CountingTokenizer("new")), range(N))
    assert len(list(folder.iterdir())) == 2
    check(opened(lines, folder, used), range(N))
    assert used.texts == 0


def test_few_examples_are_not_worth_a_file(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH_EXAMPLES", 6)
    check(opened(lines, tmp_path / "cache"), range(5))
    assert not (tmp_path / "cache").exists()
