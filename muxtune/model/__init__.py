"""The backbone: a frozen decoder-only transformer, described by its shapes."""

from muxtune.model.config_keys import NO_FOREIGN_CODE
from muxtune.model.digest import BackboneDigest, backbone_digest
from muxtune.model.families import FAMILIES, LayerInput
from muxtune.model.hugging_face import spec_from_hf
from muxtune.model.load import load_model_spec
from muxtune.model.presets import BYTE_VOCAB, PRESETS
from muxtune.model.sharding import check_sharding, sharding_obstacle
from muxtune.model.spec import (
    ALL_LINEAR,
    DTYPE_BYTES,
    LAYER_INPUTS,
    MOST_LAYERS,
    Dtype,
    Family,
    LinearSpec,
    ModelSpec,
)
from muxtune.model.stored import check_stored, is_pickled, locate_tensors, match_names, weight_files

__all__ = [
    "ALL_LINEAR",
    "BYTE_VOCAB",
    "DTYPE_BYTES",
    "FAMILIES",
    "LAYER_INPUTS",
    "MOST_LAYERS",
    "NO_FOREIGN_CODE",
    "PRESETS",
    "BackboneDigest",
    "Dtype",
    "Family",
    "LayerInput",
    "LinearSpec",
    "ModelSpec",
    "backbone_digest",
    "check_sharding",
    "check_stored",
    "is_pickled",
    "load_model_spec",
    "locate_tensors",
    "match_names",
    "sharding_obstacle",
    "spec_from_hf",
    "weight_files",
]
