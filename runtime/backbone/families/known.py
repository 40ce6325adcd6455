"""The parts of all families that the domain knows."""

from __future__ import annotations

from runtime.backbone.families.family import FamilyParts
from runtime.backbone.families.gpt2 import GPT2
from runtime.backbone.families.llama import LLAMA
from runtime.backbone.families.opt import OPT

FAMILY_PARTS: dict[str, FamilyParts] = {"llama": LLAMA, "gpt2": GPT2, "opt": OPT}
