"""Keys of a Hugging Face configuration: those that are executed, have one allowed value, or change nothing.

What a backbone computes is what transformers' own model of its family computes in evaluation mode. A key that
this model reads is executed, or held to the one value that is; a key that is known to change no result
(training, generation, other heads, metadata) may have any value. Any other key may mean that the folder's
owner computes something else, so it is refused unless it says nothing: null, false or empty.
``docs/backbones.md`` has the same tables for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxtune.model.spec import Family
from muxtune.support.errors import SpecError

Fields = Mapping[str, Any]
"""Keys and values of a configuration."""

EXECUTED: dict[Family, frozenset[str]] = {
    "llama": frozenset(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings hidden_act rms_norm_eps rope_parameters rope_scaling rope_theta "
        "partial_rotary_factor attention_bias mlp_bias tie_word_embeddings".split()
    ),
    "gpt2": frozenset(
        "vocab_size n_embd hidden_size n_inner n_layer num_hidden_layers n_head num_attention_heads "
        "n_positions max_position_embeddings activation_function layer_norm_epsilon "
        "tie_word_embeddings".split()
    ),
    "opt": frozenset(
        "vocab_size hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings "
        "word_embed_proj_dim activation_function enable_bias tie_word_embeddings".split()
    ),
}
"""Keys whose every value is executed, or is refused where its shape is read."""

_ANY_FAMILY: dict[str, Any] = {"is_encoder_decoder": False}

PLAIN: dict[Family, Fields] = {
    "llama": _ANY_FAMILY | {"sliding_window": None},
    "gpt2": _ANY_FAMILY
    | {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "opt": _ANY_FAMILY
    | {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
}
"""Keys that change what is computed, with the only value that is executed."""

HARMLESS: frozenset[str] = frozenset(
    # What it is, and how it was stored
    "model_type architectures transformers_version _name_or_path name_or_path _commit_hash dtype torch_dtype "
    "torchscript tokenizer_class unsloth_fixed unsloth_version is_llama_config transformers.js_config "
    # How transformers runs it: the same results, up to rounding
    "attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_cache "
    "return_dict output_attentions output_hidden_states tie_last_hidden_states chunk_size_feed_forward "
    "pretraining_tp gradient_checkpointing use_bfloat16 tf_legacy_loss is_decoder "
    # Training: the frozen backbone is deterministic, and starts from stored weights
    "initializer_range init_std attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout "
    "activation_dropout hidden_dropout layerdrop "
    # Heads for other purposes
    "id2label label2id num_labels problem_type finetuning_task classifier_dropout summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout summary_last_dropout "
    # Token ids (the tokenizer's count), and lengths that nothing reads
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id pad_token n_ctx max_sequence_length "
    # Generation
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty "
    "epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores prefix "
    "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind "
    "task_specific_params temperature top_k top_p typical_p".split()
)
"""Keys that change no result, whatever their value."""

ROPE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
}
"""Rotary tables that do not change with the length, by ``rope_type``, and the keys that each reads."""

_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})

ACTIVATIONS: frozenset[str] = frozenset(
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish "
    "laplace leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh".split()
)
"""Transformers' activations without parameters of their own."""

_ACTIVATION_KEYS: dict[Family, str] = {
    "llama": "hidden_act",
    "gpt2": "activation_function",
    "opt": "activation_function",
}


def check_not_foreign(raw: Fields, where: Path) -> None:
    """Refuse a configuration of quantized weights, or one whose code lies in the folder.

    Args:
        raw: Content of the file, before transformers reads it.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the key.
    """
    if raw.get("quantization_config"):
        expected = "none: quantized weights are not executed (dequantize, and save in bfloat16 or float32)"
        raise SpecError(f"{where}: quantization_config", raw["quantization_config"], expected)
    if raw.get("auto_map"):
        raise SpecError(f"{where}: auto_map", raw["auto_map"], NO_FOREIGN_CODE)


NO_FOREIGN_CODE = "none: a folder's own code is never run, and it would make another model or tokenizer"


def check_known(raw: Fields, family: Family, where: Path) -> None:
    """Refuse every key that is in no table of the family, unless it says nothing.

    Args:
        raw: Content of the file.
        family: Family of the backbone.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the key.
    """
    known = EXECUTED[family] | PLAIN[family].keys() | HARMLESS
    for key, value in raw.items():
        if key not in known and not _says_nothing(value):
            expected = f"a key of {family}; this one may change what is computed (remove it if it does not)"
            raise SpecError(f"{where}: {key}", value, expected)


def check_values(loaded: Fields, family: Family, where: Path) -> None:
    """Refuse a key with another value than the one that is executed, and an activation with parameters.

    Args:
        loaded: A configuration as transformers understands it, with its defaults.
        family: Family of the backbone.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the key, its value and what was expected.
    """
    for key, value in PLAIN[family].items():
        found = loaded.get(key)
        if found is not None and found != value:
            raise SpecError(f"{where}: {key}", found, str(value))
    activation = _ACTIVATION_KEYS[family]
    if loaded[activation] not in ACTIVATIONS:
        expected = f"an activation of transformers without parameters: {', '.join(sorted(ACTIVATIONS))}"
        raise SpecError(f"{where}: {activation}", loaded[activation], expected)


def check_aliases(raw: Fields, names: Mapping[str, str], where: Path) -> None:
    """Refuse one key under two names with different values.

    Args:
        raw: Content of the file.
        names: The main name of each alias.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the alias.
    """
    for alias, name in names.items():
        if alias in raw and name in raw and raw[alias] != raw[name]:
            raise SpecError(f"{where}: {alias}", raw[alias], f"{raw[name]}, as {name} says")


def check_rope(rope: Fields, where: Path) -> None:
    """Refuse rotary tables that change with the length, and parameters that their type does not read.

    Raises:
        SpecError: Names the key.
    """
    field, kind = f"{where}: rope_parameters", rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE:
        expected = "default, linear or llama3: tables that do not change with the length"
        raise SpecError(f"{field}.rope_type", kind, expected)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        expected = "1.0: heads are rotated whole"
        raise SpecError(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], expected)
    known = ROPE[kind] | _ROPE_COMMON | {"partial_rotary_factor"}
    for key, value in rope.items():
        if key not in known and not _says_nothing(value):
            raise SpecError(f"{field}.{key}", value, f"no key that rope_type {kind} does not read")


def deciding(raw: Fields, family: Family) -> dict[str, Any]:
    """The part of a configuration that decides results."""
    keys = EXECUTED[family] | PLAIN[family].keys()
    return {key: raw[key] for key in sorted(keys) if raw.get(key) is not None}


def _says_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
