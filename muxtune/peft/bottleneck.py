"""Bottleneck adapters: a small MLP behind a block (arXiv 1902.00751, 2005.00247) or beside it (2110.04366).

``f(x) = U act(D x + d) + u`` with ``size`` features between the two. A block's output ``y`` becomes
``y + scale f(y)`` where the adapter is serial, and ``y + scale f(x)`` where it is parallel; ``x`` is what the
block's linears read, the norm's output. Both stand before the residual is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import GpuWork, OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.method import METHODS
from muxtune.peft.representation import NOTHING, Attachment, Extra, TrainedTensor
from muxtune.peft.sites import EMBEDDING, Site, site_of
from muxtune.peft.spec import LARGEST_FACTOR, LayeredSpec
from muxtune.support.errors import SpecError

Block = Literal["attention", "mlp"]
Activation = Literal["gelu", "relu", "silu", "tanh"]


def _once(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("expected each of attention and mlp once at most")
    return blocks


class BottleneckSpec(LayeredSpec):
    """A small MLP behind or beside whole blocks."""

    method: Literal["bottleneck"]
    """The PEFT method."""
    size: int = Field(gt=0)
    """Features between the down- and the up-projection."""
    placement: Literal["serial", "parallel"] = "serial"
    """``serial`` reads what the block gives, ``parallel`` what its linears read."""
    blocks: Annotated[tuple[Block, ...], Field(min_length=1), AfterValidator(_once)] = ("attention", "mlp")
    """Blocks that have one: both as Houlsby et al. have it, ``[mlp]`` as Pfeiffer et al. have it."""
    activation: Activation = "gelu"
    """Between the two projections."""
    scale: float = Field(default=1.0, gt=0, le=LARGEST_FACTOR)
    """Factor of what is added."""

    @property
    def kinked(self) -> bool:
        """Whether its activation has a kink."""
        return self.activation == "relu"


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Two products, activation, addition, and the task's rows taken out and put back.

    Backward: four products, the activation again, its derivative, sums for both biases, and additions.
    """
    features, size, tokens = dims
    flops, weights = 4.0 * tokens * features * size, 2.0 * features * size
    if phase == "fwd":
        moved = weights + tokens * (9 * features + 4 * size)
        return OperatorWork(flops, model.dtype_bytes * moved, 7)
    moved = 5 * weights + tokens * (10 * features + 10 * size)
    return OperatorWork(2 * flops, model.dtype_bytes * moved, 16)


def _gpu(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> GpuWork:
    """Products in the precision of adapters, float32; conversions and everything elementwise by bytes."""
    features, size, tokens = dims
    wide, narrow = float(tokens * features), float(tokens * size)
    given = model.dtype_bytes
    own = max(given, DTYPE_BYTES["float32"])
    converts = int(own != given)
    convert_bytes = converts * (given + own) * wide
    down, up = (tokens, size, features), (tokens, features, size)
    if phase == "fwd":
        bytes_ = convert_bytes + (6 * given + own) * wide + 2 * own * narrow
        return GpuWork((down, up), bytes_, 4 + converts)
    bytes_ = 2 * convert_bytes + (4 * given + 4 * own) * wide + 6 * own * narrow
    bytes_ += 3 * own * 2.0 * features * size  # gradients are added to those of earlier micro-batches
    return GpuWork((down, up, (size, features, tokens), (features, size, tokens)), bytes_, 11 + 2 * converts)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """Sizes at the width of the backbone; an adapter sees one task's tokens."""
    tokens = (16, 256, 4096) if quick else (16, 64, 128, 256, 512, 1024, 4096)
    sizes = (8, 64) if quick else (4, 16, 64, 256)
    for size in sorted({min(size, model.hidden) for size in sizes}):
        for n in tokens:
            yield model.hidden, size, n


@METHODS.register("bottleneck")
class Bottleneck:
    """The method."""

    summary = "small MLPs behind or beside blocks (bottleneck adapters)"
    spec = BottleneckSpec
    kinds: Mapping[str, OperatorKind] = {
        "bottleneck": OperatorKind(
            dims=("features", "size", "tokens"),
            work=_work,
            gpu=_gpu,
            grid=_grid,
            split=looked_up(1),
            fitted="adapter",
            samples=((4096, 64, 512),),
        )
    }

    def check(self, spec: BottleneckSpec, model: ModelSpec, where: str) -> None:
        """Refuse layers that are not there, and what is wider than the backbone."""
        spec.check_layers(model, where)
        if spec.size > model.hidden:
            expected = f"at most {model.hidden}, the hidden size of {model.name}"
            raise SpecError(f"{where}.size", spec.size, expected)

    def attachments(self, spec: BottleneckSpec, model: ModelSpec, layer: int) -> tuple[Attachment, ...]:
        """One at each of its blocks."""
        if layer == EMBEDDING or not spec.has_layer(layer):
            return ()
        return _adapters(spec, model)

    def extra(self, spec: BottleneckSpec) -> Extra:
        """Nothing."""
        return NOTHING


@lru_cache(maxsize=8192)
def _adapters(spec: BottleneckSpec, model: ModelSpec) -> tuple[Attachment, ...]:
    blocks: tuple[Block, ...] = ("attention", "mlp")
    return tuple(
        _adapter(spec, model, site_of(model, "block", each)) for each in blocks if each in spec.blocks
    )


def _adapter(spec: BottleneckSpec, model: ModelSpec, site: Site) -> Attachment:
    """Tensors are whole on all ranks: it reads before the copy to them or behind their sum, and joins there.

    A serial one keeps a copy of what its own tokens read, which nobody else keeps.
    """
    width, size = site.out_features, spec.size
    serial = spec.placement == "serial"
    own_bytes = max(model.dtype_bytes, DTYPE_BYTES["float32"])
    inside = size * own_bytes  # before the activation
    # What is added, the sum, and the sum in the backbone's precision where that is another.
    forward = width * (2 * own_bytes + (model.dtype_bytes if own_bytes != model.dtype_bytes else 0))
    return Attachment(
        site=site,
        reads="output" if serial else "input",
        tensors=(
            TrainedTensor("down.weight", (size, width)),
            TrainedTensor("down.bias", (size,)),
            TrainedTensor("up.weight", (width, size)),
            TrainedTensor("up.bias", (width,)),
        ),
        adapter=OperatorShape("bottleneck", (width, size)),
        keeps_input=not serial,
        kept_bytes=inside + (width * model.dtype_bytes if serial else 0),
        workspace_bytes=(forward, 0),
        input_flops=2.0 * size * width,
    )
