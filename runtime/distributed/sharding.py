"""What one of several tensor-parallel ranks holds of a backbone's weights and of adapters (arXiv 1909.08053).

Linears that read a norm's output are cut by their outputs, the other two of a layer by their inputs; heads
and the MLP's width follow. Key and value heads that are fewer than the ranks are held by several of them.
What is trained is cut where its method says (:class:`muxtune.peft.TrainedTensor`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from muxtune.model import LinearSpec, ModelSpec
from muxtune.peft import Site, TrainedTensor
from runtime.distributed.teams import Team

OUTPUTS, INPUTS = 0, 1
"""Dimensions of a linear's weight, of B and of A; a bias has the first."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the ranks that share a stage."""

    index: int = 0
    ranks: int = 1
    team: Team | None = None
    """All of them; None if there is one."""

    def span(self, n: int) -> tuple[int, int]:
        """Range of its part of ``n`` things: as many for each rank, or one more for the first ones."""
        each, more = divmod(n, self.ranks)
        start = self.index * each + min(self.index, more)
        return start, start + each + (self.index < more)


WHOLE = Shard()
"""A rank that has a stage for itself."""


@dataclass(frozen=True, slots=True)
class Portion:
    """What a rank holds of one dimension of a tensor."""

    dim: int
    size: int
    """Size of the whole dimension."""
    ranges: tuple[tuple[int, int], ...]
    holders: int = 1
    """Ranks that hold each of these elements."""
    partial: bool = False
    """Whether each of them has a part of the elements' gradient only, so that they sum it."""

    @classmethod
    def all_of(cls, tensor: Tensor) -> Portion:
        """A tensor that nobody else holds."""
        return cls(0, len(tensor), ((0, len(tensor)),))

    @property
    def whole(self) -> bool:
        """Whether it is all of the dimension."""
        return self.ranges == ((0, self.size),)

    def take(self, whole: Tensor) -> Tensor:
        """Take this part of a whole tensor; may be a view."""
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def inside(self, dim: int, start: int, size: int, own: int) -> Portion:
        """This part of a whole that is itself a part of a larger tensor.

        Args:
            dim: Dimension in which the larger tensor is divided.
            start: Where the whole begins in it.
            size: Size of the larger tensor there.
            own: Size of the whole there.
        """
        ranges = self.ranges if dim == self.dim else ((0, own),)
        assert dim == self.dim or self.whole, "a tensor is cut and put together in one dimension"
        moved = tuple((start + first, start + stop) for first, stop in ranges)
        return replace(self, dim=dim, size=size, ranges=moved)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write this part into a whole tensor."""
        sizes = [stop - start for start, stop in self.ranges]
        for (start, _), piece in zip(self.ranges, part.split(sizes, self.dim), strict=True):
            whole.narrow(self.dim, start, piece.shape[self.dim]).copy_(piece)

    def whole_like(self, part: Tensor) -> Tensor:
        """Zeros in the shape of the whole tensor."""
        return part.new_zeros([self.size if dim == self.dim else n for dim, n in enumerate(part.shape)])


@dataclass(frozen=True, slots=True)
class Entries(Portion):
    """What a rank holds of a list of places in a matrix: those of its own rows and columns."""

    picked: Tensor | None = field(default=None, compare=False)
    """Positions in the list, ascending."""

    @property
    def whole(self) -> bool:
        """Whether they are all."""
        return self._positions.numel() == self.size

    @property
    def _positions(self) -> Tensor:
        assert self.picked is not None
        return self.picked

    def take(self, whole: Tensor) -> Tensor:
        """Take the values of the rank's places."""
        return whole.index_select(0, self._positions.to(whole.device))

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the rank's values to their positions."""
        whole.index_copy_(0, self._positions.to(whole.device), part)


def entries_portion(spec: ModelSpec, site: Site, places_2N: Tensor, shard: Shard) -> tuple[Entries, Tensor]:
    """What a rank holds of places in a linear's weight.

    Args:
        spec: The backbone, whole.
        site: Site of the linear.
        places_2N: Rows (outputs) and columns (inputs) of the whole weight.
        shard: The rank.

    Returns:
        The rank's entries of the list, and their rows and columns in the rank's own weight.
    """
    linear = next(linear for linear in spec.linears if linear.name == site.path)
    portions = linear_portions(spec, linear, shard)
    own_2N = torch.stack([_own(p, places) for p, places in zip(portions, places_2N.long(), strict=True)])
    (picked,) = (own_2N >= 0).all(0).nonzero(as_tuple=True)
    cut, _ = portions if linear.split_by_outputs else portions[::-1]
    size = places_2N.shape[1]
    entries = Entries(0, size, ((0, size),), cut.holders, cut.holders > 1, picked)
    return entries, own_2N[:, picked]


def _own(portion: Portion, features: Tensor) -> Tensor:
    """Numbers of features among those that a rank holds; -1 for others."""
    own = torch.full((portion.size,), -1)
    count = 0
    for start, stop in portion.ranges:
        own[start:stop] = torch.arange(count, count + stop - start)
        count += stop - start
    return own[features]


def linear_portions(spec: ModelSpec, linear: LinearSpec, shard: Shard) -> tuple[Portion, Portion]:
    """What a rank holds of a linear's outputs and of its inputs; one of them is whole."""
    ranges, holders = _split_ranges(spec, linear, shard)
    whole_outputs = Portion(OUTPUTS, linear.out_features, ((0, linear.out_features),), shard.ranks)
    whole_inputs = Portion(INPUTS, linear.in_features, ((0, linear.in_features),), shard.ranks)
    if linear.split_by_outputs:
        return Portion(OUTPUTS, linear.out_features, ranges, holders), whole_inputs
    return whole_outputs, Portion(INPUTS, linear.in_features, ranges, holders)


def tensor_portion(spec: ModelSpec, site: Site, tensor: TrainedTensor, shard: Shard) -> Portion:
    """What a rank holds of a tensor of an adapter at a site.

    Elements that are cut, and that several ranks hold all the same, belong to shared key and value heads:
    each of the ranks has other queries, and with them a part of the gradient.
    """
    dim, size = tensor.dim, tensor.shape[tensor.dim]
    if tensor.sharded in {"none", "entries"}:  # which entries a rank holds only the file says
        return Portion(dim, size, ((0, size),), shard.ranks, tensor.partial and shard.ranks > 1)
    if tensor.sharded == "keys_values":
        held, holders = _held_kv_heads(spec, shard)
        keys, values = (_features(spec, held, before=n) for n in (0, spec.kv_heads))
        return Portion(dim, size, (keys, values), holders, holders > 1)
    linear = next(linear for linear in spec.linears if linear.name == site.path)
    outputs, inputs = linear_portions(spec, linear, shard)
    portion = outputs if tensor.sharded == "outputs" else inputs
    each = portion.size // size  # features for each element: 1, or those of a head
    ranges = tuple((start // each, stop // each) for start, stop in portion.ranges)
    return replace(portion, dim=dim, size=size, ranges=ranges, partial=portion.holders > 1)


def _split_ranges(
    spec: ModelSpec, linear: LinearSpec, shard: Shard
) -> tuple[tuple[tuple[int, int], ...], int]:
    """Held features of the dimension that is cut, and how many ranks hold each."""
    if linear.reads in {"mlp", "inner"}:
        return (shard.span(spec.ffn),), 1
    queries = _features(spec, shard.span(spec.heads))
    if linear.reads == "attended":
        return (queries,), 1
    kv_heads, holders = _held_kv_heads(spec, shard)
    if linear.out_features == spec.heads * spec.head_dim:  # if keys are as wide, they are cut alike
        return (queries,), 1
    if linear.out_features == spec.kv_heads * spec.head_dim:
        return (_features(spec, kv_heads),), holders
    assert holders == 1, "where queries, keys and values are one linear, there are as many heads of each"
    keys, values = (_features(spec, kv_heads, before=n) for n in (spec.heads, spec.heads + spec.kv_heads))
    return (queries, keys, values), 1


def _held_kv_heads(spec: ModelSpec, shard: Shard) -> tuple[tuple[int, int], int]:
    if spec.kv_heads % shard.ranks == 0:
        return shard.span(spec.kv_heads), 1
    holders = shard.ranks // spec.kv_heads
    head = shard.index // holders
    return (head, head + 1), holders


def _features(spec: ModelSpec, heads: tuple[int, int], *, before: int = 0) -> tuple[int, int]:
    """Features of these heads, with other heads before them."""
    return (before + heads[0]) * spec.head_dim, (before + heads[1]) * spec.head_dim


Part = tuple[Portion, Tensor]
"""A rank's part of a tensor."""


def name_part(key: str, layer: int) -> str:
    """Name of a layer's part of a tensor that the file of an adapter has whole for several layers."""
    return f"{key}@{layer}"


def file_key(name: str) -> str:
    """Name of the file's tensor of which a parameter is a part."""
    return name.partition("@")[0]


def assemble(ranks: Iterable[Mapping[str, Part]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks; where several ranks hold an element, they hold the same."""
    whole: dict[str, Tensor] = {}
    for parts in ranks:
        for name, (portion, part) in parts.items():
            key = file_key(name)
            if key not in whole:
                whole[key] = portion.whole_like(part)
            portion.put(part, whole[key])
    return whole
