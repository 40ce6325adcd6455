"""Tokenizers: bytes for presets, the directory's own otherwise, never with special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.dataset import load_task_data
from muxtune.errors import SpecError
from muxtune.model import BYTE_VOCAB, PRESETS, load_model_spec
from muxtune.tokenizer import ByteTokenizer, HfTokenizer, load_tokenizer
from tests.plans import make_task

WORDS = ("the", "cat", "sat")


def save_tokenizer(folder, *, bos=True, eos=True, adds_bos_itself=False):
    """A word-level tokenizer with the special tokens asked for, written as transformers writes it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if adds_bos_itself:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = (
        {"unk_token": "<unk>"}
        | ({"bos_token": "<s>"} if bos else {})
        | ({"eos_token": "</s>"} if eos else {})
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_config(folder, vocab_size=8):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=64,
    ).save_pretrained(folder)


@given(st.text())
def test_bytes_are_the_utf8_of_the_text(text):
    assert bytes(ByteTokenizer().encode(text)).decode() == text


@pytest.mark.parametrize("model", PRESETS.values(), ids=lambda m: m.name)
def test_presets_have_room_for_all_bytes_and_special_tokens(model):
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, ByteTokenizer)
    assert 255 < tokenizer.bos_id < tokenizer.eos_id < BYTE_VOCAB <= model.vocab
    assert BYTE_VOCAB % 8 == 0


@pytest.mark.parametrize("adds_bos_itself", [True, False])
def test_a_directory_brings_its_own_tokenizer_without_special_tokens(tmp_path, adds_bos_itself):
    save_tokenizer(tmp_path, adds_bos_itself=adds_bos_itself)
    save_config(tmp_path)
    tokenizer = load_tokenizer(load_model_spec(str(tmp_path)))
    assert isinstance(tokenizer, HfTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("the cat ran") == [3, 4, 0]
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(("bos", "expected"), [(True, [1, 3, 4, 5, 2]), (False, [3, 4, 5, 2])])
def test_examples_begin_with_bos_only_where_the_tokenizer_has_one(tmp_path, bos, expected):
    save_tokenizer(tmp_path, bos=bos, adds_bos_itself=bos)
    save_config(tmp_path)
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"prompt": "the cat", "completion": "sat"}\n')
    model = load_model_spec(str(tmp_path))
    (example,) = load_task_data(make_task("t", dataset={"path": str(lines)}), model).examples
    assert example.tokens.tolist() == expected
    assert example.target_tokens == 2


def test_a_directory_without_tokenizer_is_refused_in_one_line(tmp_path):
    save_config(tmp_path)
    with pytest.raises(SpecError, match="expected a directory with its tokenizer") as caught:
        HfTokenizer(tmp_path, 8)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    save_tokenizer(tmp_path, eos=False)
    save_config(tmp_path)
    with pytest.raises(SpecError, match=r"tokenizer\.eos_token = None: expected an EOS token"):
        HfTokenizer(tmp_path, 8)


def test_a_tokenizer_with_more_ids_than_the_backbone_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    save_config(tmp_path, vocab_size=5)
    with pytest.raises(SpecError, match=r"tokenizer size = 6: expected at most vocab_size \(5\)"):
        load_tokenizer(load_model_spec(str(tmp_path)))
