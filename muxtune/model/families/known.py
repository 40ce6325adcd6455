"""All families."""

from __future__ import annotations

from muxtune.model.families.family import BackboneFamily
from muxtune.model.families.gpt2 import GPT2
from muxtune.model.families.llama import LLAMA
from muxtune.model.families.opt import OPT

FAMILIES: dict[str, BackboneFamily] = {family.name: family for family in (LLAMA, GPT2, OPT)}
