"""SHiRA (arXiv 2406.13175): trained entries of frozen weights, as many as a low-rank pair has numbers."""

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
from muxtune.peft.spec import LayeredSpec, Targets
from muxtune.support.errors import SpecError


class ShiraSpec(LayeredSpec):
    """Sparse high-rank adapters (arXiv 2406.13175): ``(W + S) x`` with ``r (in + out)`` entries in ``S``."""

    method: Literal["shira"]
    """The PEFT method."""
    r: int = Field(gt=0)
    """Entries per feature: a linear has ``r`` times its inputs and outputs together."""
    targets: Targets
    """Linears that are adapted."""


@METHODS.register("shira")
class Shira:
    """The method."""

    summary = "random entries of weights, as many as a low-rank pair has numbers (SHiRA)"
    spec = ShiraSpec
    kinds: Mapping[str, OperatorKind] = {"sparse": SPARSE}

    def check(self, spec: ShiraSpec, model: ModelSpec, where: str) -> None:
        """Refuse targets that match nothing, more entries than there are, and what peft cannot adapt."""
        targeted = model.targeted_linears(spec.targets, f"{where}.targets")
        spec.check_layers(model, where)
        if model.transposed_weights:
            expected = (
                f"another method, such as diff: PEFT has it for torch's linears, {model.name} has Conv1D"
            )
            raise SpecError(f"{where}.method", spec.method, expected)
        most = min(
            linear.in_features * linear.out_features // (linear.in_features + linear.out_features)
            for linear in targeted
        )
        if spec.r > most:
            expected = f"at most {most}, with which the smallest of its linears in {model.name} is full"
            raise SpecError(f"{where}.r", spec.r, expected)

    def attachments(self, spec: ShiraSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """Entries at each targeted linear."""
        if layer == EMBEDDING or not spec.has_layer(layer):
            return ()
        return _entries(spec, model)

    def extra(self, spec: ShiraSpec) -> Extra:
        """Nothing."""
        return NOTHING


def count_entries(spec: ShiraSpec, linear: LinearSpec) -> int:
    """Trained entries of a whole linear."""
    return spec.r * (linear.in_features + linear.out_features)


@lru_cache(maxsize=8192)
def _entries(spec: ShiraSpec, model: ModelSpec) -> tuple[Attachment, ...]:
    targeted = {linear.name for linear in model.targeted_linears(spec.targets, "targets")}
    return tuple(
        entries_attachment(model, site, "shira_weight", count_entries(spec, whole_linear(model, site.path)))
        for site in linear_sites(model)
        if site.path in targeted
    )
