"""Trained entries of frozen weights: what methods with a sparse difference share.

A task's difference of a weight is zero but for some entries, whose places are drawn once from its seed. The
frozen weight is never copied: ``(W + S) x`` is computed as ``W x + S x``.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxtune.model import DTYPE_BYTES, LinearSpec, ModelSpec
from muxtune.operators import OperatorKind, OperatorShape, OperatorWork, Phase
from muxtune.operators.kinds import looked_up
from muxtune.peft.representation import Attachment, TrainedTensor
from muxtune.peft.sites import Site

_INDEX_BYTES = 4


def _work(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """A sparse product, added; backward: the transposed one, added, and a product at places.

    Rows of the stream are turned into columns before each product, and its result is turned back.
    """
    i, o, entries, tokens = dims
    flops, matrix = 2.0 * entries * tokens, (model.dtype_bytes + _INDEX_BYTES) * entries
    if phase == "fwd":
        return OperatorWork(flops, matrix + model.dtype_bytes * tokens * (3 * i + 6 * o), 4)
    return OperatorWork(2 * flops, 3 * matrix + model.dtype_bytes * tokens * (9 * i + 6 * o), 10)


def _grid(model: ModelSpec, quick: bool) -> Iterable[tuple[int, ...]]:
    """As many entries as pairs of low rank have numbers, at every linear."""
    tokens = (64, 1024) if quick else (16, 64, 256, 1024, 4096)
    for i, o in sorted({(linear.in_features, linear.out_features) for linear in model.linears}):
        for entries in sorted({min(r * (i + o), i * o) for r in ((1, 16) if quick else (1, 8, 32))}):
            for n in tokens:
                yield i, o, entries, n


SPARSE = OperatorKind(
    dims=("in_features", "out_features", "entries", "tokens"),
    work=_work,
    grid=_grid,
    split=looked_up(2),
    fitted="adapter",
    samples=((4096, 4096, 65536, 512),),
)
"""A task's difference of one linear: ``y += S x``; ``bwd`` has its entries' gradients and the input's."""


def whole_linear(model: ModelSpec, path: str) -> LinearSpec:
    """A linear of the backbone that a model is a shard of."""
    return next(linear for linear in model.whole.linears if linear.name == path)


def entries_attachment(model: ModelSpec, site: Site, name: str, entries: int) -> Attachment:
    """Trained entries at a linear.

    Args:
        model: The backbone, or a shard of it.
        site: Site of the linear.
        name: Name of the tensor of values.
        entries: Entries of the whole weight; a shard has its share of them, on average.
    """
    i, o = site.in_features, site.out_features
    whole = whole_linear(model, site.path)
    own = max(round(entries * (i * o) / (whole.in_features * whole.out_features)), 1)
    own_bytes = max(model.dtype_bytes, DTYPE_BYTES["float32"])
    return Attachment(
        site=site,
        tensors=(TrainedTensor(name, (own,), "entries"),),
        adapter=OperatorShape("sparse", (i, o, own)),
        keeps_input=True,
        # Both factors as the library turns them, and the product before and after.
        workspace_bytes=(own_bytes * (i + 2 * o), own_bytes * (2 * i + o)),
        input_flops=2.0 * own,
    )
