"""Hugging Face directories with small random backbones and tokenizers of their own, and texts to train on.

Nothing of ours is imported: what lies in a directory means what transformers says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WORDS = (
    "the a quick red fox jumps over lazy dogs while rain falls on Zürich and 12 or 7 birds sing naïve tunes"
)
VOCABULARY = 300
"""256 bytes, special tokens, and merges: joining prompt and completion first would give other tokens."""


def random_texts(seed: int, count: int, words: tuple[int, int]) -> list[str]:
    """Texts of between ``words[0]`` and ``words[1]`` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(*words))) for _ in range(count)]


def write_prompts(path: Path, *, seed: int, count: int, prompt_words: tuple[int, int]) -> None:
    """JSONL with prompts and completions of one or two words."""
    prompts = random_texts(seed, count, prompt_words)
    completions = random_texts(seed + 1, count, (1, 2))
    pairs = zip(prompts, completions, strict=True)
    _write_lines(path, ({"prompt": prompt, "completion": completion} for prompt, completion in pairs))


def write_plain_texts(path: Path, *, seed: int, count: int, words: tuple[int, int]) -> None:
    """JSONL with texts that are learned from their first token on."""
    _write_lines(path, ({"text": text} for text in random_texts(seed, count, words)))


def _write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save_llama(folder: Path, *, plain: bool, kv_heads: int = 2) -> Path:
    """LlamaForCausalLM: 4 layers, 4 heads on fewer key/value heads, heads wider than hidden / heads.

    Args:
        folder: Is made.
        plain: Head tied to the embedding, no biases, a tokenizer with BOS; or else none of the three.
        kv_heads: Key/value heads.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=128,
        attention_bias=not plain,
        tie_word_embeddings=plain,
    )
    save_random_model(folder, config, seed=1)
    save_tokenizer(folder, bos="<s>" if plain else None, eos="</s>")
    return folder


def save_gpt2(folder: Path) -> Path:
    """GPT2LMHeadModel with tied embeddings; one token is both BOS and EOS."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=128,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    save_random_model(folder, config, seed=2)
    save_tokenizer(folder, bos="<|endoftext|>", eos="<|endoftext|>")
    return folder


def save_opt(folder: Path, *, plain: bool) -> Path:
    """OPTForCausalLM with tied embeddings; one token is both BOS and EOS.

    Args:
        folder: Is made.
        plain: ReLU and biases, as OPT; or else GELU and no biases, as Galactica.
    """
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        activation_function="relu" if plain else "gelu",
        enable_bias=plain,
        init_std=0.1,
        dropout=0.0,
    )
    save_random_model(folder, config, seed=3)
    save_tokenizer(folder, bos="</s>", eos="</s>")
    return folder


def save_preset(folder: Path, name: str) -> Path:
    """A tiny preset as a directory, from the numbers that ``muxtune models`` shows.

    A preset's weights are those that transformers draws, in float32, after ``torch.manual_seed(0)``.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    configs: dict[str, PreTrainedConfig] = {
        "llama-tiny": LlamaConfig(
            vocab_size=264,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
        ),
        "gpt2-tiny": GPT2Config(
            vocab_size=264,
            n_embd=256,
            n_layer=6,
            n_head=8,
            n_positions=1024,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        "opt-tiny": OPTConfig(
            vocab_size=264,
            hidden_size=256,
            ffn_dim=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=1024,
            word_embed_proj_dim=256,
            pad_token_id=None,
            dropout=0.0,
        ),
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configs[name], dtype=torch.float32).save_pretrained(folder)
    return folder


def save_random_model(folder: Path, config: PreTrainedConfig, *, seed: int) -> None:
    """Weights from the configuration's own initialization.

    Biases and norms, which it sets to 0 and 1, are moved away from there, so that forgetting them shows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)


def save_tokenizer(folder: Path, *, bos: str | None, eos: str) -> None:
    """Byte-level BPE that puts BOS in front unless it is told not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(random_texts(0, 50, (4, 12)), trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    names = {"eos_token": eos} | ({"bos_token": bos} if bos is not None else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
