"""The frozen backbone as transformers has it: its configuration, and the whole model."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from muxtune.model import ModelSpec, check_stored, is_pickled, match_names, weight_files
from muxtune.support.errors import SpecError
from runtime.backbone.families import FAMILY_PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def torch_dtype(spec: ModelSpec) -> torch.dtype:
    """Dtype of weights and activations."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def hf_config(spec: ModelSpec) -> PreTrainedConfig:
    """Configuration of the backbone: the directory's own, or a preset's with all dropouts 0."""
    from transformers import AutoConfig  # noqa: PLC0415  # seconds to import

    if spec.source != "preset":
        return AutoConfig.from_pretrained(spec.source, local_files_only=True, trust_remote_code=False)
    common = {
        "vocab_size": spec.vocab,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    return FAMILY_PARTS[spec.family].config(spec, common)


def load_hf_model(spec: ModelSpec) -> PreTrainedModel:
    """The whole backbone as transformers builds it, on CPU, in evaluation mode.

    The weights of a preset are drawn under its ``init_seed``; torch's global generator is left as it was.

    Raises:
        SpecError: The weights of a directory are missing, unreadable or incomplete.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # seconds to import

    if spec.source != "preset":
        return _load_directory(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.init_seed)
        # Drawn in float32 and then cast, so that a preset is the same model in every dtype.
        model = AutoModelForCausalLM.from_config(
            hf_config(spec), dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    return model.to(torch_dtype(spec)).eval()


def _load_directory(spec: ModelSpec) -> PreTrainedModel:
    from safetensors import SafetensorError  # noqa: PLC0415  # with transformers
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # seconds to import

    if is_pickled(weight_files(Path(spec.source))):
        check_pickled(spec)
    else:
        check_stored(spec)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.source,
            dtype=torch_dtype(spec),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(
            "model.source", spec.source, f"a directory with readable weights ({reason})"
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise SpecError("model.source", spec.source, f"weights for all of the model; missing {missing}")
    return model.eval()


def check_pickled(spec: ModelSpec) -> None:
    """Refuse ``*.bin`` files that do not hold exactly the backbone's tensors; no code in them is run.

    Raises:
        SpecError: Names the tensors.
    """
    names: set[str] = set()
    for file in weight_files(Path(spec.source)):
        try:
            names |= torch.load(
                file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file)
            ).keys()
        except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            reason = f"a directory with readable weights ({file.name}: {' '.join(str(error).split())[:200]})"
            raise SpecError("model.source", spec.source, reason) from error
    match_names(spec, names)
