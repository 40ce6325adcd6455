"""What a task's adapter does at one base op of one rank."""

# t tokens of one task, I features in, O features out, D hidden size or width of a head, K key/value heads,
# P rows or keys in front

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from muxtune.model import ModelSpec
from muxtune.tasks import PeftTask
from runtime.distributed.sharding import Portion, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """The base op that an adapter is attached to, as a rank has it."""

    model: ModelSpec
    """The backbone, whole."""
    shard: Shard
    """Place among the tensor-parallel ranks; ``shard.team`` sums over them."""
    task: PeftTask
    layer: int
    """Number of the layer; ``EMBEDDING`` for the embedding."""
    path: str
    """Path of the base op in the backbone, such as ``model.layers.0.self_attn.q_proj``."""
    inputs: Portion
    """What the rank has of its inputs."""
    outputs: Portion
    """What the rank has of its outputs."""
    columns: tuple[int, int]
    """Its outputs among those of the product that holds it: linears that read the same input are one."""
    weight_OI: Tensor | None = None
    """The rank's part of a linear's frozen weight, a view."""
    bias_O: Tensor | None = None
    """Bias of the rank's outputs. Of an input-split linear every rank has it, and one adds it to the sum."""
    before: tuple[TaskAdapter, ...] = ()
    """The task's adapters that were attached to the same base op before."""
    places_2N: Tensor | None = None
    """Rows and columns of trained entries in the rank's part of the weight, where a method has such."""


class TaskAdapter:
    """One task's part at one base op: it sees its task's tokens alone.

    What it does not override it leaves as it is. Which of these is asked follows from the attachment
    (:class:`muxtune.peft.Attachment`):

    rewrites_input                 :meth:`dispatch`
    a linear, reads the input      :meth:`update`, unless the method has an adder for it
    a linear or block, otherwise   :meth:`aggregate`
    embedding                      :meth:`embed`
    keys_values                    :meth:`keys_values`
    """

    def renew(self) -> Tensor | None:
        """Renew what follows from the trained tensors: when they are there, and each time they have changed.

        Returns:
            The rank's term of a sum over the tensor-parallel ranks that it needs for that, which
            :meth:`renewed` gets; None if it needs none.
        """
        return None

    def renewed(self, total: Tensor) -> None:
        """Take the sum of what :meth:`renew` returned on all ranks."""

    def dispatch(self, x_tI: Tensor) -> Tensor:
        """What the frozen op reads instead of its input: the rank's part of it."""
        return x_tI

    def update(self, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """What is added to the linear's outputs, ``[t, O]``; on input-split linears a term of the ranks' sum.

        Args:
            x_tI: What the linear reads: the rank's part of it.
            keys_t: States of the tokens for masks of dropout (:mod:`runtime.ops.dropout`), if a task has any.
        """
        raise NotImplementedError(f"{type(self).__name__} adds nothing")

    def aggregate(self, y_tO: Tensor, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """What stands in the place of the base op's output, which is whole: summed over the ranks.

        Args:
            y_tO: Output of the base op. Of an output-split linear, the rank's own outputs.
            x_tI: What the base op reads; of a block, before the copy to the ranks.
            keys_t: As for :meth:`update`.
        """
        return y_tO

    def embed(self, hidden_tD: Tensor, positions_t: Tensor) -> Tensor:
        """Hidden states in the place of the embedded tokens.

        Args:
            hidden_tD: Embedded tokens of the task, before learned positions are added.
            positions_t: Position of each in its sequence; the first ones are those of virtual tokens.
        """
        return hidden_tD

    def keys_values(self) -> Tensor | None:
        """Keys and values that all tokens of the task attend to, ``[P, 2 K D]`` of the rank's heads."""
        return None
