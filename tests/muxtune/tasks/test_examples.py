"""A text as a sequence: BOS, prompt, completion, EOS, and what is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.tasks.tokenizer import ByteTokenizer
from tests.muxtune.tasks.sequences import BOS, EOS, ControlTokenizer, NoBosTokenizer, make_example, text
from tests.sampling import examples


@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "tokens", "target_start"),
    [
        ("ab", "cd", 64, "<abcd>", 3),
        ("ab", "cd", 6, "<abcd>", 3),
        ("ab", "cd", 5, "<bcd>", 2),  # the prompt loses its left end
        ("ab", "cd", 4, "<cd>", 1),
        ("ab", "cd", 3, "<cd", 1),  # then the completion its right end, EOS first
        ("ab", "cd", 2, "<c", 1),
        ("", "cd", 64, "<cd>", 1),
        ("ab", "", 64, "<ab>", 3),
        ("", "", 64, "<>", 1),
        (None, "abc", 64, "<abc>", 1),
        (None, "abc", 4, "<abc", 1),
    ],
)
def test_bos_prompt_completion_eos_within_max_length(prompt, completion, max_length, tokens, target_start):
    example = make_example(prompt, completion, ByteTokenizer(), max_length)
    assert text(example) == tokens
    assert example.target_start == target_start
    assert example.target_tokens == len(tokens) - target_start


@pytest.mark.parametrize(
    ("prompt", "completion", "max_length", "tokens", "target_start"),
    [
        ("ab", "cd", 64, "abcd>", 2),
        ("ab", "cd", 4, "bcd>", 1),
        ("ab", "cd", 3, "cd>", 1),  # nothing stands before "c" that could predict it
        ("", "cd", 64, "cd>", 1),
        (None, "abc", 64, "abc>", 1),
    ],
)
def test_without_bos_the_first_token_is_no_target(prompt, completion, max_length, tokens, target_start):
    example = make_example(prompt, completion, NoBosTokenizer(), max_length)
    assert text(example) == tokens
    assert example.target_start == target_start


@given(st.text(max_size=30), st.text(max_size=30), st.integers(2, 80))
@settings(max_examples=examples(300))
def test_truncation_keeps_the_completion_as_long_as_it_can(prompt, completion, max_length):
    example = make_example(prompt, completion, ByteTokenizer(), max_length)
    head, targets = list(prompt.encode()), [*completion.encode(), EOS]
    kept = max(0, min(len(head), max_length - 1 - len(targets)))
    expected = [BOS, *head[len(head) - kept :], *targets][:max_length]
    assert example.tokens.tolist() == expected
    assert example.tokens.dtype == np.int64
    assert example.tokens[example.target_start :].tolist() == targets[: max_length - 1 - kept]


def test_a_bos_that_the_text_brings_survives_truncation():
    example = make_example("<abcd", "ef>", ControlTokenizer(), 6)
    assert text(example) == "<cdef>"
    assert example.target_start == 3


def test_a_token_that_is_bos_and_eos_at_once_is_recognized_at_both_ends():
    tokenizer = ControlTokenizer(bos_is_eos=True)
    assert text(make_example(None, "<ab>", tokenizer, 64)) == ">ab>"
    assert text(make_example(None, ">", tokenizer, 64)) == ">>"
