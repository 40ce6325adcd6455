"""One representation of every parameter-efficient method: what a task adds to a frozen backbone.

base op    the frozen operator, block or tensor that something is attached to, see
           :class:`muxtune.peft.sites.Site`; it runs once for all tasks of an hTask
dispatch   what the adapter reads, and what the base op reads where the method rewrites that
adapter    the trained part; it runs for its task's tokens, alone or in one launch with those of other tasks
aggregate  how its result joins that of the base op

A method is a choice of the four for each base op that it adapts: an :class:`Attachment`. Graph, memory,
costs, planner and runtime ask attachments and know no method. Widths are those of the backbone that the
attachment was asked for: of a shard (:meth:`muxtune.model.ModelSpec.shard`), those that one rank has.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from muxtune.operators import OperatorShape
from muxtune.peft.sites import Site, Step, depth_of

Reads = Literal["input", "output", "nothing"]
Joins = Literal["add", "multiply", "replace", "extend"]
Sharded = Literal["none", "inputs", "outputs", "keys_values", "entries"]


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One tensor of an attachment, as PEFT's file has it whole; the only place where its sharding is said."""

    name: str
    """Name under the path of the site, such as ``lora_A.weight``."""
    shape: tuple[int, ...]
    sharded: Sharded = "none"
    """Features of the site that tensor-parallel ranks cut it by; ``keys_values`` are heads, and ``entries``
    places in a linear's weight: a rank has those of its own rows and columns. By features it has an element
    for each of them, or for all of a head."""
    dim: int = 0
    """Dimension that is cut."""
    partial: bool = False
    """Whether each rank that holds an element has a part of its gradient only, so that ranks sum it: true
    before a rank's own features, and before the sum over the ranks; false where all ranks compute the same.
    Elements that are cut are whole, unless several ranks hold them: shared key and value heads."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """Dispatch, adapter and aggregate of one task at one site of one layer.

    Where tensor-parallel ranks share a layer, what reads a linear's input and adds to its output works on the
    rank's own features, as a term of the same sum. Everything that reads an output works after the sum; and
    what is attached to a block reads its input before the copy to the ranks, and joins after the sum.
    """

    site: Site
    reads: Reads = "input"
    """What the adapter reads of the base op."""
    rewrites_input: bool = False
    """Whether the base op reads what the adapter gives, instead of the input itself."""
    joins: Joins = "add"
    """How the result joins; ``extend``: more keys, or rows of the stream."""
    tensors: tuple[TrainedTensor, ...]
    adapter: OperatorShape
    """Operator of the trained part, with what joins its result."""
    dispatch: OperatorShape | None = None
    """Operator of its own before it, such as dropout; the adapter then shares no launch."""
    launch: str | None = None
    """Adapters at one site whose launches have one name run in one; None: alone."""
    keeps_input: bool = False
    """Whether the base op's input is kept for the backward."""
    kept_bytes: int = 0
    """Bytes that a token of the task keeps beside that."""
    workspace_bytes: tuple[int, int] = (0, 0)
    """Bytes that a token of the task needs while the adapter runs, forward and backward, where it needs more
    than a result and its gradient."""
    input_flops: float = 0.0
    """Floating-point operations of a token's backward for the gradient of the adapter's input, which nobody
    needs of the first trained thing."""
    dropout: float = 0.0
    """Probability that a feature of what the adapter reads is dropped."""

    @property
    def depth(self) -> int:
        """Place in the order in which a layer runs, see :mod:`muxtune.peft.sites`."""
        if self.site.kind == "embedding":
            return self.site.block
        return depth_of(self.site.block, self.step)

    @property
    def step(self) -> Step:
        """Step of its block in which it runs."""
        if self.site.kind != "linear":
            return Step.BLOCK
        if self.rewrites_input:
            return Step.REWRITE
        return Step.LINEAR if self.reads == "input" else Step.OUTPUT

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def partial_parameters(self) -> int:
        """Parameters of which each tensor-parallel rank has a part of the gradient."""
        return sum(tensor.size for tensor in self.tensors if tensor.partial)


@dataclass(frozen=True, slots=True)
class Extra:
    """What a method puts in front of every sequence."""

    rows: int = 0
    """Virtual tokens: rows of the stream, with positions of their own."""
    keys: int = 0
    """Keys and values without rotation that every token attends to, in every layer; positions of the sequence
    begin behind them. They come from attachments to ``keys_values``."""


NOTHING = Extra()
