"""Diff pruning (arXiv 2012.07463) under a fixed mask: trained entries of frozen weights, a share of each.

The mask is drawn from the task's seed once, instead of being learned: a learned one would need a gradient of
every weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from pydantic import Field

from muxtune.model import LinearSpec, ModelSpec
from muxtune.operators import OperatorKind
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra
from muxtune.peft.sites import EMBEDDING, linear_sites
from muxtune.peft.sparse import SPARSE, entries_attachment, whole_linear
from muxtune.peft.targets import TargetedSpec, targeted_paths


class DiffSpec(TargetedSpec):
    """Sparse differences of weights (arXiv 2012.07463): ``(W + S) x``, a share of the entries in ``S``."""

    method: Literal["diff"]
    """The PEFT method."""
    density: float = Field(gt=0, le=1)
    """Share of a weight's entries that are trained; at least one is."""


@METHODS.register("diff")
class Diff:
    """The method."""

    summary = "a random share of the entries of weights (diff pruning with a fixed mask)"
    spec = DiffSpec
    kinds: Mapping[str, OperatorKind] = {"sparse": SPARSE}

    def check(self, spec: DiffSpec, model: ModelSpec, where: str) -> None:
        """Refuse targets that match nothing, and layers that are not there."""
        spec.check_targets(model, where)

    def attachments(self, spec: DiffSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """Entries at each targeted linear."""
        return () if layer == EMBEDDING else _entries(spec, model, targeted_paths(spec, model)[layer])

    def extra(self, spec: DiffSpec) -> Extra:
        """Nothing."""
        return NOTHING


def count_entries(spec: DiffSpec, linear: LinearSpec) -> int:
    """Trained entries of a whole linear."""
    return max(round(spec.density * linear.in_features * linear.out_features), 1)


@lru_cache(maxsize=8192)
def _entries(spec: DiffSpec, model: ModelSpec, targeted: frozenset[str]) -> tuple[Attachment, ...]:
    return tuple(
        entries_attachment(model, site, "weight.values", count_entries(spec, whole_linear(model, site.path)))
        for site in linear_sites(model)
        if site.path in targeted
    )
