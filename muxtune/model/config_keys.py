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

from muxtune.model.families import BackboneFamily, Fields, says_nothing
from muxtune.support.errors import SpecError

HARMLESS: frozenset[str] = frozenset(
    # What it is, and how it was stored
    "model_type architectures transformers_version _name_or_path name_or_path _model_name_or_path "
    "_commit_hash dtype torch_dtype torchscript tokenizer_class unsloth_fixed unsloth_version "
    "is_llama_config transformers.js_config "
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

ACTIVATIONS: frozenset[str] = frozenset(
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish "
    "laplace leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh".split()
)
"""Transformers' activations without parameters of their own."""


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


def check_known(raw: Fields, family: BackboneFamily, where: Path) -> None:
    """Refuse every key that is in no table of the family, unless it says nothing.

    Args:
        raw: Content of the file.
        family: Family of the backbone.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the key.
    """
    known = family.executed_keys | family.fixed_keys.keys() | HARMLESS
    for key, value in raw.items():
        if key not in known and not says_nothing(value):
            expected = (
                f"a key of {family.name}; this one may change what is computed (remove it if it does not)"
            )
            raise SpecError(f"{where}: {key}", value, expected)


def check_values(loaded: Fields, family: BackboneFamily, where: Path) -> None:
    """Refuse a key with another value than the one that is executed, and an activation with parameters.

    Args:
        loaded: A configuration as transformers understands it, with its defaults.
        family: Family of the backbone.
        where: Name of the file in messages.

    Raises:
        SpecError: Names the key, its value and what was expected.
    """
    for key, value in family.fixed_keys.items():
        found = loaded.get(key)
        if found is not None and found != value:
            raise SpecError(f"{where}: {key}", found, str(value))
    activation = family.activation_key
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


def deciding(raw: Fields, family: BackboneFamily) -> dict[str, Any]:
    """The part of a configuration that decides results."""
    keys = family.executed_keys | family.fixed_keys.keys()
    return {key: raw[key] for key in sorted(keys) if raw.get(key) is not None}
