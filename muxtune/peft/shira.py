"""SHiRA (arXiv 2406.13175): trained entries of frozen weights, as many as a low-rank pair has numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from muxtune.model import LinearSpec, ModelSpec
from muxtune.operators import OperatorKind
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra
from muxtune.peft.sites import EMBEDDING, linear_sites
from muxtune.peft.sparse import SPARSE, entries_attachment, whole_linear
from muxtune.peft.start import check_said
from muxtune.peft.targets import TargetedSpec, targeted_paths
from muxtune.support.errors import SpecError


class ShiraSpec(TargetedSpec):
    """Sparse high-rank adapters (arXiv 2406.13175): ``(W + S) x`` with ``r (in + out)`` entries in ``S``."""

    method: Literal["shira"]
    """The PEFT method."""
    r: int = Field(gt=0)
    """Entries per feature: a linear has ``r`` times its inputs and outputs together."""


_SILENT = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode peft_version "
    "revision runtime_config target_modules task_type init_weights mask_type random_seed".split()
)
"""Keys of peft's configuration that do not change what a saved adapter computes, or that its tensors show."""


@METHODS.register("shira")
class Shira:
    """The method."""

    summary = "random entries of weights, as many as a low-rank pair has numbers (SHiRA)"
    spec = ShiraSpec
    kinds: Mapping[str, OperatorKind] = {"sparse": SPARSE}

    def check(self, spec: ShiraSpec, model: ModelSpec, where: str) -> None:
        """Refuse targets that match nothing, more entries than there are, and what peft cannot adapt."""
        spec.check_targets(model, where)
        if model.transposed_weights:
            expected = (
                f"another method, such as diff: PEFT has it for torch's linears, {model.name} has Conv1D"
            )
            raise SpecError(f"{where}.method", spec.method, expected)
        most = min(
            linear.in_features * linear.out_features // (linear.in_features + linear.out_features)
            for linear in model.linears
            if any(linear.name in paths for paths in targeted_paths(spec, model))
        )
        if spec.r > most:
            expected = f"at most {most}, with which the smallest of its linears in {model.name} is full"
            raise SpecError(f"{where}.r", spec.r, expected)

    def attachments(self, spec: ShiraSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """Entries at each targeted linear."""
        return () if layer == EMBEDDING else _entries(spec, model, targeted_paths(spec, model)[layer])

    def check_start(self, spec: ShiraSpec, model: ModelSpec, config: Mapping[str, Any], where: str) -> None:
        """Refuse an adapter of another method; that it has the task's tensors is seen when it is loaded."""
        assert spec.init is not None, "asked only then"
        check_said(config, {"peft_type": "SHIRA", "r": spec.r}, _SILENT, spec.init, where)

    def extra(self, spec: ShiraSpec) -> Extra:
        """Nothing."""
        return NOTHING


def count_entries(spec: ShiraSpec, linear: LinearSpec) -> int:
    """Trained entries of a whole linear."""
    return spec.r * (linear.in_features + linear.out_features)


@lru_cache(maxsize=8192)
def _entries(spec: ShiraSpec, model: ModelSpec, targeted: frozenset[str]) -> tuple[Attachment, ...]:
    return tuple(
        entries_attachment(model, site, "shira_weight", count_entries(spec, whole_linear(model, site.path)))
        for site in linear_sites(model)
        if site.path in targeted
    )
