"""Tokenizers: bytes for presets, the directory's own otherwise, never with special tokens."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.model import BYTE_VOCAB, PRESETS, load_model_spec
from muxtune.support.errors import SpecError
from muxtune.tasks import load_task_data, load_tokenizer
from muxtune.tasks.tokenizer import ByteTokenizer, HfTokenizer
from tests.integration.solo_peft import SoloTask, read_examples
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
    assert tokenizer.adds_bos == adds_bos_itself
    assert tokenizer.encode_batch(["the", "", "cat sat"]) == [[3], [], [4, 5]]
    assert tokenizer.encode_batch([]) == []


def test_control_tokens_in_a_text_are_recognized_unless_they_are_not_allowed(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = HfTokenizer(tmp_path, 8)
    assert tokenizer.encode("<s> the</s>") == [1, 3, 2]
    assert not {1, 2} & set(tokenizer.encode("<s> the</s>", allow_special=False))
    assert tokenizer.encode_batch(["</s>"]) == [[2]]  # the tokenizer keeps no state between calls


def test_a_tokenizer_is_read_once_until_one_of_its_files_changes(tmp_path):
    save_tokenizer(tmp_path)
    save_config(tmp_path)
    model = load_model_spec(str(tmp_path))
    first = load_tokenizer(model)
    assert load_tokenizer(model) is first
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert load_tokenizer(model) is first
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace('"cat"', '"dog"'))
    second = load_tokenizer(model)
    assert second.digest != first.digest
    assert second.encode("the dog") == [3, 4]


@pytest.mark.parametrize("adds_bos_itself", [True, False])
def test_examples_are_those_of_the_reference_of_solo_runs(tmp_path, adds_bos_itself):
    save_tokenizer(tmp_path, adds_bos_itself=adds_bos_itself)
    save_config(tmp_path)
    lines = tmp_path / "d.jsonl"
    records = [
        {"prompt": prompt, "completion": completion}
        for prompt in ("", "the", "<s> the cat", "the <s> cat cat cat")
        for completion in ("sat", "sat </s>", "<s> sat", "")
    ]
    records += [{"text": text} for text in ("the cat", "<s> the </s>", "<s>")]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = make_task("t", dataset={"path": str(lines)}, max_length=6, global_batch_size=20)
    data = load_task_data(task, load_model_spec(str(tmp_path)))
    reference = SoloTask(
        model_dir=tmp_path,
        dtype="float32",
        byte_tokens=False,
        dataset=lines,
        peft="{}",
        global_batch_size=20,
        max_length=6,
        learning_rate=1e-3,
        steps=1,
    )
    expected = read_examples(reference)
    assert [(e.tokens.tolist(), e.target_start) for e in data.examples] == expected


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
