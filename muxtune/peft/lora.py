"""LoRA (arXiv 2106.09685): a low-rank pair beside a linear, ``W x + (alpha / r) B A x``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

from pydantic import Field

from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra, TrainedTensor
from muxtune.peft.sites import EMBEDDING, Site, linear_sites
from muxtune.peft.spec import LARGEST_FACTOR, LayeredSpec, Targets
from muxtune.support.errors import SpecError


class LoraSpec(LayeredSpec):
    """Low-rank adapters (arXiv 2106.09685): ``W x + (alpha / r) B A x``."""

    method: Literal["lora"]
    """The PEFT method."""
    r: int = Field(gt=0)
    """Rank of the update."""
    alpha: float = Field(gt=0, le=LARGEST_FACTOR)
    """The update is scaled by ``alpha / r``."""
    targets: Targets
    """Linears that are adapted."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a feature of A's input is dropped, as PEFT's ``lora_dropout``."""

    @property
    def scale(self) -> float:
        """Factor of the update, ``alpha / r``."""
        return self.alpha / self.r

    @property
    def drops(self) -> bool:
        """Whether it has dropout."""
        return self.dropout > 0


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """``x A B`` and its addition; backward: both factors' gradients, the input's, and its addition."""
    i, o, r, tokens = dims
    flops, weights = 2.0 * tokens * r * (i + o), r * (i + o)
    if phase == "fwd":
        return OperatorWork(flops, model.dtype_bytes * (weights + tokens * (i + 2 * r + 2 * o)), 4)
    return OperatorWork(2 * flops, model.dtype_bytes * (3 * weights + tokens * (3 * i + 4 * r + 2 * o)), 8)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Ranks at every linear; an adapter sees one task's tokens, rarely more than a thousand."""
    tokens = (16, 64, 256, 1024, 4096) if quick else (16, 64, 128, 256, 512, 1024, 4096)
    ranks = (1, 8, 64) if quick else (1, 4, 8, 16, 64)
    for i, o in sorted({(linear.in_features, linear.out_features) for linear in model.linears}):
        for r in sorted({min(r, i, o) for r in ranks}):
            for n in tokens:
                yield i, o, r, n


@METHODS.register("lora")
class Lora:
    """The method."""

    summary = "low-rank pairs beside linears (LoRA)"
    spec = LoraSpec
    kinds: Mapping[str, OperatorKind] = {
        "lora": OperatorKind(
            dims=("in_features", "out_features", "r", "tokens"),
            work=_work,
            grid=_grid,
            split=looked_up(2),
            fitted="adapter",
            samples=((4096, 4096, 8, 512), (4096, 4096, 64, 512)),
            mixed=2,
            mixed_sizes=(16, 64),
        )
    }

    def check(self, spec: LoraSpec, model: ModelSpec, where: str) -> None:
        """Refuse targets that match nothing, layers that are not there, and too large a rank."""
        targeted = model.targeted_linears(spec.targets, f"{where}.targets")
        spec.check_layers(model, where)
        largest = min(min(linear.in_features, linear.out_features) for linear in targeted)
        if spec.r > largest:
            expected = f"at most {largest}, the smallest side of its linears in {model.name}"
            raise SpecError(f"{where}.r", spec.r, expected)

    def attachments(self, spec: LoraSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """A pair at each targeted linear."""
        if layer == EMBEDDING or not spec.has_layer(layer):
            return ()
        return _pairs(spec, model)

    def extra(self, spec: LoraSpec) -> Extra:
        """Nothing."""
        return NOTHING


@lru_cache(maxsize=8192)
def _pairs(spec: LoraSpec, model: ModelSpec) -> tuple[Attachment, ...]:
    targeted = {linear.name for linear in model.targeted_linears(spec.targets, "targets")}
    return tuple(_pair(spec, model, site) for site in linear_sites(model) if site.path in targeted)


def _pair(spec: LoraSpec, model: ModelSpec, site: Site) -> Attachment:
    """A is cut where the linear's inputs are, B where its outputs are; the other factor is whole.

    Each rank has the whole factor, and a part of the sum that is its gradient.
    """
    i, o, r = site.in_features, site.out_features, spec.r
    by_outputs = site.split_by_outputs
    return Attachment(
        site=site,
        tensors=(
            TrainedTensor("lora_A.weight", (r, i), "none" if by_outputs else "inputs", 1, by_outputs),
            TrainedTensor("lora_B.weight", (o, r), "outputs" if by_outputs else "none", 0, not by_outputs),
        ),
        adapter=OperatorShape("lora", (i, o, r)),
        dispatch=OperatorShape("dropout", (i,)) if spec.dropout else None,
        launch=None if spec.dropout else "lora",
        keeps_input=True,
        kept_bytes=r * max(model.dtype_bytes, DTYPE_BYTES["float32"]),  # A x
        input_flops=2.0 * r * i,
        dropout=spec.dropout,
    )


def everywhere(r: int) -> LoraSpec:
    """A pair of this rank on every linear: what the profiler's whole stages have."""
    return LoraSpec(method="lora", r=r, alpha=float(r), targets=("all-linear",))


def at_first_linear(model: ModelSpec) -> LoraSpec:
    """A pair on the first linear of each layer: about the least that an adapter makes a backbone keep."""
    name = model.linears[0].name.rsplit(".", 1)[-1]
    return LoraSpec(method="lora", r=1, alpha=1, targets=(name,))
