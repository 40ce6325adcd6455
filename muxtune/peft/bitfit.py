"""BitFit (arXiv 2106.10199): the biases of a backbone's linears, trained as differences to its own.

Biases of norms stay as they are: what a norm gives is read by several linears and by blocks, and by the tasks
beside. So do those of linears that have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal

from muxtune.model import ModelSpec
from muxtune.operators import OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra, TrainedTensor
from muxtune.peft.sites import EMBEDDING, Site, linear_sites
from muxtune.peft.spec import LayeredSpec
from muxtune.support.errors import SpecError


class BitFitSpec(LayeredSpec):
    """Trained biases (arXiv 2106.10199): ``W x + b + d``."""

    method: Literal["bitfit"]
    """The PEFT method."""


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """An addition in place; backward: the sum of the output's gradient over the tokens."""
    features, tokens = dims
    elements = float(features * tokens)
    if phase == "fwd":
        return OperatorWork(elements, model.dtype_bytes * (2 * elements + features), 1)
    return OperatorWork(elements, model.dtype_bytes * (elements + 3 * features), 2)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Outputs of the linears."""
    tokens = (64, 1024) if quick else (16, 64, 256, 1024, 4096)
    widths = sorted({linear.out_features for linear in model.linears if model.has_bias(linear)})
    return ((width, n) for width in widths for n in tokens)


@METHODS.register("bitfit")
class BitFit:
    """The method."""

    summary = "biases of all linears that have one (BitFit)"
    spec = BitFitSpec
    kinds: Mapping[str, OperatorKind] = {
        "bias": OperatorKind(
            dims=("features", "tokens"),
            work=_work,
            grid=_grid,
            split=looked_up(1),
            fitted="adapter",
            samples=((4096, 512),),
        )
    }

    def check(self, spec: BitFitSpec, model: ModelSpec, where: str) -> None:
        """Refuse a backbone without biases, and layers that are not there."""
        if not any(model.has_bias(linear) for linear in model.linears):
            expected = f"another method: the linears of {model.name} have no biases"
            raise SpecError(f"{where}.method", spec.method, expected)
        spec.check_layers(model, where)

    def attachments(self, spec: BitFitSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """A difference at each linear that has a bias."""
        if layer == EMBEDDING or not spec.has_layer(layer):
            return ()
        return _differences(model)

    def extra(self, spec: BitFitSpec) -> Extra:
        """Nothing."""
        return NOTHING


@lru_cache(maxsize=256)
def _differences(model: ModelSpec) -> tuple[Attachment, ...]:
    biased = {linear.name for linear in model.linears if model.has_bias(linear)}
    return tuple(_difference(site) for site in linear_sites(model) if site.path in biased)


def _difference(site: Site) -> Attachment:
    """It is cut where the outputs are; of an input-split linear the first rank adds it to its own term.

    So that rank alone has its gradient, and the others get it by the sum of parts.
    """
    by_outputs = site.split_by_outputs
    o = site.out_features
    tensor = TrainedTensor("bias", (o,), "outputs" if by_outputs else "none", partial=not by_outputs)
    return Attachment(site=site, tensors=(tensor,), adapter=OperatorShape("bias", (o,)))
