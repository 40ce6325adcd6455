"""Families of backbones, one module each."""

from muxtune.model.families.family import BackboneFamily, Fields, LayerInput, says_nothing
from muxtune.model.families.known import FAMILIES
from muxtune.model.families.rope import ROPE

__all__ = ["FAMILIES", "ROPE", "BackboneFamily", "Fields", "LayerInput", "says_nothing"]
