"""Every family that the domain knows has its parts, and both say the same of it."""

import pytest
import torch

from muxtune.model import PRESETS
from muxtune.model.families import FAMILIES
from runtime.backbone.families import FAMILY_PARTS
from runtime.backbone.hugging_face import hf_config, load_hf_model

TINY = {name.removesuffix("-tiny"): spec for name, spec in PRESETS.items() if name.endswith("-tiny")}


def test_every_family_has_its_parts_and_a_tiny_preset():
    assert list(FAMILY_PARTS) == list(FAMILIES)
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_a_familys_tensors_are_those_of_transformers(family):
    spec = TINY[family].model_copy(update={"layers": 1})
    names = load_hf_model(spec).state_dict().keys()
    entry = FAMILIES[family]
    wanted = {entry.embedding, entry.positions or entry.embedding, f"{entry.final_norm}.weight"}
    wanted |= {f"{entry.layers}.0.{norm}.weight" for norm in entry.layer_norms}
    wanted |= {f"{entry.layers}.0.{linear.name}.weight" for linear in spec.linears}
    assert wanted <= names
    assert hf_config(spec).model_type == family


@pytest.mark.parametrize("family", FAMILIES)
def test_only_families_without_a_table_of_positions_rotate(family):
    spec = TINY[family]
    rope = FAMILY_PARTS[family].rope(spec, hf_config(spec), "cpu")
    assert (rope is None) == spec.learned_positions
    assert rope is None or torch.isfinite(rope.cos).all()
