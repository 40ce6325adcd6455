"""The table of operator kinds: what their dimensions are, how much work they do, how a profile has them.

The work is that of a straightforward implementation; it gives a latency its shape. What a real
implementation does better or worse is the ratio that :class:`muxtune.costs.profiled.ProfiledCosts` measures
on top. A PEFT method adds the kinds of its own operators (:mod:`muxtune.peft`), whose last dimension is
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from muxtune.model import ModelSpec
from muxtune.support.errors import MuxTuneError

Phase = Literal["fwd", "bwd"]
PHASES: tuple[Phase, Phase] = ("fwd", "bwd")

Dims = tuple[int, ...]
Split = tuple[tuple[float, ...], tuple[float, ...]]


class OperatorWork(NamedTuple):
    """Work of one operator."""

    flops: float
    bytes: float
    launches: float
    """Kernels, or calls of library functions; messages one after the other where ranks communicate."""


class GpuWork(NamedTuple):
    """What an adapter runs on a GPU, one after the other."""

    products: tuple[tuple[int, int, int], ...] = ()
    """Products ``[m, k] x [k, n]`` as (m, n, k), in the precision of adapters."""
    bytes: float = 0.0
    """Bytes that elementwise kernels read and write."""
    kernels: int = 0
    """These kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorKind:
    """A kind of operators."""

    dims: tuple[str, ...]
    """Names of the dimensions. Heads, widths and vocabulary come from the backbone."""
    work: Callable[[Dims, Phase, ModelSpec], OperatorWork] | None
    """Work at a shape; None for what is composed of other kinds."""
    grid: Callable[[ModelSpec, bool], Iterable[Dims]] | None = None
    """Shapes that a profile measures, of a backbone, quickly or not; None where the profiler chooses them
    itself, as of the frozen operators, or measures none."""
    backward: bool = True
    """Whether it runs in a backward, too."""
    between: Literal["neighbours", "group"] | None = None
    """Ranks that it runs between; it is measured between them, and no suite builds it."""
    derived: bool = False
    """Whether no suite builds it and no profile has it: its price comes from that of other kinds."""
    split: Callable[[Dims], Split] = lambda dims: ((), dims)
    """Dimensions that a profile looks up, and those that it interpolates, in this order."""
    samples: tuple[Dims, ...] = ()
    """Usual sizes, whose prices tell costs apart that somebody else wrote."""
    gpu: Callable[[Dims, Phase, ModelSpec], GpuWork] | None = None
    """What runs on a GPU that is not at hand; without it, as many bytes as ``work`` moves, in as many
    kernels. The frozen operators have models of their own (:mod:`muxtune.costs.analytic`)."""
    fitted: str = "other"
    """Class of kinds that have a factor together, by which a stage differs from the sum of its operators."""
    mixed: int | None = None
    """Dimension in which the operators of one launch may differ beside their tokens, such as a rank."""
    mixed_sizes: tuple[int, int] = (0, 0)
    """Two sizes of that dimension at which a search prices a launch; between, it draws straight lines."""


MOST_DIMS = 5
"""Dimensions of a kind, at most: a profile has a column for each."""


def looked_up(first: int) -> Callable[[Dims], Split]:
    """A split: the first dimensions are looked up, the others interpolated."""
    return lambda dims: (dims[:first], dims[first:])


def add_kinds(kinds: Mapping[str, OperatorKind]) -> None:
    """Add kinds to the table.

    Raises:
        MuxTuneError: A name is taken by another kind, or a kind has too many dimensions.
    """
    for name, kind in kinds.items():
        if len(kind.dims) > MOST_DIMS:
            raise MuxTuneError(f"the operator kind {name!r} has more than {MOST_DIMS} dimensions")
        if KINDS.setdefault(name, kind) is not kind:
            raise MuxTuneError(f"the operator kind {name!r} is there already")


def dimensions(kind: str) -> tuple[str, ...]:
    """Names of a kind's dimensions."""
    return KINDS[kind].dims


def _linear(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """One GEMM in both phases: the frozen weight has no gradient."""
    i, o, tokens = dims
    return OperatorWork(2.0 * i * o * tokens, model.dtype_bytes * (i * o + tokens * (i + o)), 1)


def _dropout(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Mask, and the masked input; backward: both again, and the masked gradient, which is added.

    A mask is one byte per feature, computed from 64-bit numbers, each for four features, in pieces that stay
    in the cache.
    """
    elements = float(dims[0] * dims[1])
    moved = 2 if phase == "fwd" else 7
    return OperatorWork(
        3.0 * elements, (model.dtype_bytes * moved + 3) * elements, 15 if phase == "fwd" else 17
    )


def _attention(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Two causal batched GEMMs forward and five backward; queries, keys, values are moved several times."""
    sequences, length = dims
    pair = 2.0 * sequences * model.heads * model.head_dim * length * (length + 1) / 2
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    out = model.heads * model.head_dim
    moved = model.dtype_bytes * sequences * length * (4 * qkv + 2 * out)
    return OperatorWork(2 * pair, moved, 12) if phase == "fwd" else OperatorWork(5 * pair, 2 * moved, 18)


def _carried_attention(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """A rectangle of earlier keys and a triangle of own ones; earlier keys and values are gathered first."""
    sequences, queries, keys = dims
    flops, moved, launches = _attention((sequences, queries), phase, model)
    earlier = sequences * (keys - queries)
    products, copies = (2, 4) if phase == "fwd" else (5, 8)
    flops += products * 2.0 * earlier * queries * model.heads * model.head_dim
    moved += copies * model.dtype_bytes * earlier * 2 * model.kv_heads * model.head_dim
    return OperatorWork(flops, moved, launches + 4)


def _norm(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Reads input and residual, writes sum and norm; backward reads two gradients and the saved sum."""
    elements = dims[0] * model.hidden
    return OperatorWork(8.0 * elements, model.dtype_bytes * 5 * elements, 4 if phase == "fwd" else 6)


def _activation(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Element by element; a gate doubles what is read and, backward, what is written."""
    elements = dims[0] * model.ffn
    inputs = 2 if model.gated else 1
    moved = inputs + 1 if phase == "fwd" else 2 * inputs + 1
    return OperatorWork(12.0 * elements, model.dtype_bytes * moved * elements, inputs)


def _embedding(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Gathers rows of a table; learned positions add a row of a second one."""
    tables = 2 if model.learned_positions else 1
    return OperatorWork(0.0, model.dtype_bytes * 2 * tables * dims[0] * model.hidden, tables)


def _head(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Norm, one GEMM to the vocabulary and the cross-entropy over it."""
    targets = dims[0]
    elements = model.hidden * model.vocab + targets * (4 * model.hidden + 4 * model.vocab)
    return OperatorWork(2.0 * targets * model.hidden * model.vocab, model.dtype_bytes * elements, 8)


def _optimizer(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """AdamW reads parameter, gradient and both moments and writes three of them back."""
    tensors, parameters = dims
    return OperatorWork(12.0 * parameters, model.dtype_bytes * 7 * parameters, 10 + tensors)


def _feed(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Array operations for each sequence, and as many again for the micro-batch; their bytes are nothing."""
    return OperatorWork(0.0, 64.0 * dims[0], 10.0 + 10.0 * dims[0])


def _p2p(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work of one message."""
    return OperatorWork(0.0, float(dims[0]), 1)


def _ring(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work once around the ring: each rank sends all parts of the tensor but one, a message each."""
    bytes_, ranks = dims
    return OperatorWork(0.0, bytes_ * (ranks - 1) / ranks, ranks - 1)


def _all_reduce(dims: tuple[int, ...], phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work twice around the ring: a reduce-scatter, then an all-gather."""
    _, bytes_, launches = _ring(dims, phase, model)
    return OperatorWork(0.0, 2 * bytes_, 2 * launches)


def _dropout_grid(model: ModelSpec, quick: bool) -> Iterable[Dims]:
    tokens = (16, 256, 4096) if quick else (16, 64, 256, 1024, 4096)
    widths = sorted({linear.in_features for linear in model.linears})
    return ((width, n) for width in widths for n in tokens)


KINDS: dict[str, OperatorKind] = {
    "linear": OperatorKind(
        dims=("in_features", "out_features", "tokens"), work=_linear, split=looked_up(2), fitted="linear"
    ),
    "dropout": OperatorKind(dims=("features", "tokens"), work=_dropout, grid=_dropout_grid),
    # Length outside: long sequences are measured in smaller numbers.
    "attention": OperatorKind(
        dims=("sequences", "length"),
        work=_attention,
        split=lambda dims: ((), dims[::-1]),
        fitted="attention",
    ),
    "carried_attention": OperatorKind(
        dims=("sequences", "queries", "keys"), work=_carried_attention, derived=True, fitted="attention"
    ),
    "norm": OperatorKind(dims=("tokens",), work=_norm),
    "activation": OperatorKind(dims=("tokens",), work=_activation),
    "embedding": OperatorKind(dims=("tokens",), work=_embedding, backward=False),
    "head": OperatorKind(dims=("targets",), work=_head),
    # Parameters per tensor: few tensors never have the parameters of many.
    "optimizer": OperatorKind(
        dims=("tensors", "parameters"),
        work=_optimizer,
        backward=False,
        split=lambda dims: ((), (dims[0], dims[1] / dims[0])),
    ),
    "feed": OperatorKind(dims=("sequences",), work=_feed, backward=False),
    "message": OperatorKind(dims=("bytes",), work=_p2p, backward=False, between="neighbours"),
    "p2p": OperatorKind(dims=("bytes",), work=_p2p, backward=False, between="neighbours"),
    "all_reduce": OperatorKind(dims=("bytes", "ranks"), work=_all_reduce, backward=False, between="group"),
    "all_gather": OperatorKind(dims=("bytes", "ranks"), work=_ring, backward=False, between="group"),
    "reduce_scatter": OperatorKind(dims=("bytes", "ranks"), work=_ring, backward=False, between="group"),
    "stage": OperatorKind(dims=("layers", "tasks", "r", "sequences", "length"), work=None),
}
"""All kinds by name.

linear     frozen linear; bwd is the gradient of its input only
dropout    masks one task's input of one adapter; bwd has the mask again, the input and its gradient
attention  rotary embedding (Llama), gather, causal attention and scatter of equal-length sequences
carried_attention
           as attention, but the last ``queries`` of the ``keys`` of each sequence alone: the first ones come
           from earlier micro-batches
norm       residual addition and norm
activation activation of the MLP with its gate
embedding  token (and position) embedding; fwd only
head       final norm, head and cross-entropy of target tokens
optimizer  one task's step over its adapter on a stage; fwd only
feed       tensors of one micro-batch, from examples and layout; fwd only
message    processor time that sending or receiving one message takes from a rank's actions; fwd only
p2p        transfer to a neighbouring stage, until the message is there; fwd only
all_reduce sum over ranks, which all of them get; fwd only. Bytes are those of the whole tensor in all three
all_gather joins one part from each rank, so that all have the whole; fwd only
reduce_scatter
           sum over ranks, of which each gets one part; fwd only
stage      a whole micro-batch through consecutive middle layers, as the runtime executes it: one packed hTask
           of ``tasks`` tasks, each with ``sequences`` sequences of ``length`` tokens and less (see
           :func:`muxtune.graph.operators.stage_layout`) and the profiled method in size ``r`` on every linear
           (0: no adapter), forward and backward in turn; it shows what the sum of the single operators leaves
           out, and so the fixed cost of an action

The kinds of PEFT methods come to these when the methods are loaded.
"""

FROZEN_KINDS = frozenset(name for name, kind in KINDS.items() if kind.grid is None and not kind.derived)
"""Kinds that every task needs, whatever its method: those of the backbone, of messages and of steps."""

COLLECTIVE_KINDS = frozenset(name for name, kind in KINDS.items() if kind.between == "group")
"""Kinds in which a whole group of ranks takes part."""

LINK_KINDS = frozenset(name for name, kind in KINDS.items() if kind.between)
"""Kinds that use the link between ranks."""

FWD_ONLY = frozenset(name for name, kind in KINDS.items() if not kind.backward)
"""Kinds that run in no backward."""
