"""The backbone: a frozen decoder-only transformer, described by its shapes."""

from muxtune.model.hugging_face import spec_from_hf
from muxtune.model.load import load_model_spec
from muxtune.model.presets import BYTE_VOCAB, PRESETS
from muxtune.model.spec import (
    DTYPE_BYTES,
    LAYER_INPUTS,
    Dtype,
    Family,
    LayerInput,
    LinearSpec,
    ModelSpec,
)

__all__ = [
    "BYTE_VOCAB",
    "DTYPE_BYTES",
    "LAYER_INPUTS",
    "PRESETS",
    "Dtype",
    "Family",
    "LayerInput",
    "LinearSpec",
    "ModelSpec",
    "load_model_spec",
    "spec_from_hf",
]
