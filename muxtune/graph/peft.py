"""One representation of every parameter-efficient method: what a task adds to a frozen operator.

base op    the frozen operator that something is attached to; it runs once for all tasks of an hTask
dispatch   what the adapter reads, with or without dropout
adapter    the trained part; it runs for its task's tokens, alone or in one launch with those of other tasks
aggregate  how its result joins that of the base op

A method is a choice of the four for each base op that it adapts. LoRA (arXiv 2106.09685) attaches to linears:
a pair of rank r reads what the linear reads, and its result is scaled by alpha / r and added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from muxtune.graph.nodes import operator
from muxtune.graph.operators import Operator
from muxtune.model import ModelSpec
from muxtune.tasks import LoraSpec


@dataclass(frozen=True, slots=True)
class BaseOp:
    """A frozen linear of a layer, as one rank has it."""

    position: int
    """Position among the linears of the layer."""
    name: str
    """Path inside the layer."""
    block: int
    """Number of the layer's block, 0 to 3, that it belongs to."""
    in_features: int
    out_features: int
    split_by_outputs: bool
    """How tensor-parallel ranks share it, otherwise by its inputs."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What an adapter reads: its task's tokens of a tensor."""

    reads: Literal["base input"] = "base input"
    dropout: float = 0.0
    """Probability that a feature is dropped. Where it is above 0, an operator of its own masks the tokens,
    and the adapter shares its launch with no other task's."""

    def operator(self, base: BaseOp, tokens: int) -> Operator:
        """Dropout of its task's tokens."""
        return operator("dropout", base.in_features, tokens)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank pair: A ``[r, in_features]``, then B ``[out_features, r]``."""

    r: int

    def operator(self, base: BaseOp, tokens: int) -> Operator:
        """The pair on its task's tokens."""
        return operator("lora", base.in_features, base.out_features, self.r, tokens)

    def parameters(self, base: BaseOp) -> int:
        """Parameters of one rank."""
        return self.r * (base.in_features + base.out_features)

    def whole_parameters(self, base: BaseOp) -> int:
        """Parameters of the factor that tensor-parallel ranks do not split: A where the outputs are, else B.

        Each rank has it whole, and a part of the sum that is its gradient.
        """
        return self.r * (base.in_features if base.split_by_outputs else base.out_features)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """How the result joins that of the base op."""

    factor: float
    """Number that the result is multiplied by."""
    joins: Literal["add"] = "add"


@dataclass(frozen=True, slots=True)
class Attachment:
    """One choice of the four."""

    base: BaseOp
    dispatch: Dispatch
    adapter: Adapter
    aggregate: Aggregate


@lru_cache(maxsize=256)
def base_ops(model: ModelSpec) -> tuple[BaseOp, ...]:
    """What can be adapted in a layer, in the order of execution."""
    return tuple(
        BaseOp(
            position=position,
            name=linear.name,
            block=linear.block,
            in_features=linear.in_features,
            out_features=linear.out_features,
            split_by_outputs=linear.split_by_outputs,
        )
        for position, linear in enumerate(model.linears)
    )


@lru_cache(maxsize=8192)  # a search asks for the same tasks again and again
def attachments(model: ModelSpec, peft: LoraSpec) -> tuple[Attachment, ...]:
    """What a task attaches to each layer of a backbone, in the order of execution.

    Raises:
        SpecError: A target matches nothing.
    """
    adapted = {linear.name for linear in model.targeted_linears(peft.targets, "targets")}
    dispatch = Dispatch(dropout=peft.dropout)
    adapter, aggregate = Adapter(peft.r), Aggregate(peft.scale)
    return tuple(
        Attachment(base, dispatch, adapter, aggregate) for base in base_ops(model) if base.name in adapted
    )
