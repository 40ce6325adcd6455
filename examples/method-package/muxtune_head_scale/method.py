"""What the method says: a number for each attention head, in front of the output projection."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from muxtune.operators import OperatorKind, OperatorShape, OperatorWork
from muxtune.peft import EMBEDDING, Attachment, Extra, LayeredSpec, TrainedTensor, linear_sites


class HeadScaleSpec(LayeredSpec):
    """The ``peft`` of a task; ``layers`` comes with the base class."""

    method: Literal["head_scale"]


def _work(dims, phase, model):
    """One product; backward: that with the gradient, and one that is summed over the tokens."""
    heads, width, tokens = dims
    elements, passes = float(heads * width * tokens), 1 if phase == "fwd" else 3
    return OperatorWork(passes * elements, model.dtype_bytes * (2 + 2 * passes) * elements, 1 + passes)


def _grid(model, quick):
    """Shapes that a profile measures."""
    return ((model.heads, model.head_dim, n) for n in ((16, 1024) if quick else (16, 64, 256, 1024, 4096)))


class HeadScale:
    """The method in the domain."""

    summary = "a learned scale per attention head"
    spec = HeadScaleSpec
    kinds = {
        "head_scale": OperatorKind(
            dims=("heads", "head_dim", "tokens"), work=_work, grid=_grid, fitted="adapter"
        )
    }

    def check(self, spec, model, where):
        """Refuse layers that the backbone does not have."""
        spec.check_layers(model, where)

    def attachments(self, spec, model, layer):
        """What a layer gets: the same object for all layers."""
        return () if layer == EMBEDDING or not spec.has_layer(layer) else _attached(model)

    def extra(self, spec):
        """Nothing in front of sequences."""
        return Extra()


@lru_cache(maxsize=256)
def _attached(model):
    """``model`` may be what one rank has: then ``heads`` are its own."""
    site = next(site for site in linear_sites(model) if site.reads == "attended")
    return (
        Attachment(
            site=site,
            rewrites_input=True,
            joins="multiply",
            # An element for each head, cut as the features of the heads are.
            tensors=(TrainedTensor("head_scale", (model.heads,), "inputs"),),
            adapter=OperatorShape("head_scale", (model.heads, model.head_dim)),
            keeps_input=True,
            input_flops=float(model.heads * model.head_dim),
        ),
    )
