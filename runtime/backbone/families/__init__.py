"""Families of backbones, one module each: how their parts are made from weights."""

from runtime.backbone.families.family import FamilyParts
from runtime.backbone.families.known import FAMILY_PARTS

__all__ = ["FAMILY_PARTS", "FamilyParts"]
