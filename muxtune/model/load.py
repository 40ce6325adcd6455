"""A backbone by the name that a user gives it."""

from __future__ import annotations

from pathlib import Path

from muxtune.model.hugging_face import spec_from_hf
from muxtune.model.presets import PRESETS
from muxtune.model.spec import Dtype, ModelSpec
from muxtune.support.errors import unknown_name
from muxtune.support.user_files import expand_user, is_folder


def load_model_spec(name_or_dir: str, dtype: Dtype | None = None) -> ModelSpec:
    """A preset, or the backbone of a Hugging Face directory.

    Args:
        name_or_dir: Name of a preset, or a directory with ``config.json`` and weights.
        dtype: Type of weights and activations; by default the preset's own (float32 of the tiny ones,
            bfloat16 of the others), and float32 for a directory.

    Raises:
        UserError: Neither a preset nor such a directory, or an architecture that we do not execute.
    """
    if name_or_dir in PRESETS:
        preset = PRESETS[name_or_dir]
        return preset.model_copy(update={"dtype": dtype or preset.dtype})
    folder = expand_user(Path(name_or_dir), "model")
    if not is_folder(folder):
        raise unknown_name("model preset or directory", name_or_dir, PRESETS)
    return spec_from_hf(folder, dtype or "float32")
