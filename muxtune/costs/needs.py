"""Operator kinds that a workload needs the costs of, and those that a profile has for it."""

from __future__ import annotations

from collections.abc import Iterable

from muxtune.model import ModelSpec
from muxtune.operators import FROZEN_KINDS, KINDS
from muxtune.peft import EMBEDDING, METHODS, PLAIN_KIND, PeftSpec, attachments

PLAIN_KINDS = FROZEN_KINDS | {PLAIN_KIND}
"""What plain LoRA needs. Every profile has these: whole stages are measured with pairs on all linears, and
the coefficients of the device are fitted to these kinds alone, so that no price depends on what else a
profile has."""


def needed_kinds(pefts: Iterable[PeftSpec], model: ModelSpec) -> frozenset[str]:
    """Kinds that tasks with these methods run on a backbone."""
    kinds = set(PLAIN_KINDS)
    for peft in set(pefts):
        for layer in (EMBEDDING, *range(model.layers)):
            for each in attachments(peft, model, layer):
                kinds.add(each.adapter.kind)
                if each.dispatch is not None:
                    kinds.add(each.dispatch.kind)
    return frozenset(kind for kind in kinds if not KINDS[kind].derived)


def method_kinds(names: Iterable[str]) -> frozenset[str]:
    """Kinds that tasks of these methods may run, whatever their parameters; plain LoRA's are among them.

    Raises:
        UserError: There is no method of such a name.
    """
    kinds = set(PLAIN_KINDS)
    for name in names:
        own = METHODS.get(name).kinds
        kinds |= {kind for kind in own if KINDS[kind].grid is not None}
        if "dropout" in METHODS.get(name).spec.model_fields:
            kinds.add("dropout")
    return frozenset(kinds)


def methods_with(kinds: Iterable[str]) -> list[str]:
    """Names of methods to profile, as few as may be, so that these kinds are measured."""
    wanted = set(kinds) - PLAIN_KINDS
    names: list[str] = []
    for name in METHODS.names():
        if found := wanted & method_kinds((name,)):
            names.append(name)
            wanted -= found
    return names
