"""Bytes that do not depend on any micro-batch: frozen weights, tables and adapters of a stage's shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from muxtune.batches import row_slots
from muxtune.model import LinearSpec, ModelSpec
from muxtune.peft import Layers, PeftSpec, count_layers, stage_attachments
from muxtune.support.errors import SpecError

FLOAT32_BYTES = 4

MOMENTS = 2
"""AdamW's states per trained parameter, in its dtype; the step counters are not worth a term."""

_ROTARY_TABLES = 3
"""Cosines, sines, and the sines of the backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How one stage's layers are split over tensor-parallel ranks (arXiv 1909.08053).

    It is not :meth:`muxtune.model.ModelSpec.shard`, the narrower backbone that a rank is priced by; bytes
    need the whole backbone beside the number of ranks, as biases and norms are not divided.

    Linears that read a norm's output are split by their outputs, the other two by their inputs; heads and
    the MLP's width follow. What is trained is split where its method says so, as its linear is
    (:class:`muxtune.peft.TrainedTensor`). Embedding and head are split by the vocabulary. Biases and norms
    are whole.

    A data-parallel replica is a stage of its own with its share of the sequences: the bytes per rank are
    those of the share, and AdamW's state is whole on each.
    """

    tp: int = 1

    def check(self, model: ModelSpec) -> None:
        """Refuse a split through a head.

        Raises:
            SpecError: The heads cannot be dealt out evenly.
        """
        if self.tp < 1 or model.heads % self.tp:
            expected = f"a divisor of {model.heads}, the heads of {model.name}"
            raise SpecError("parallelism.tp", self.tp, expected)

    def query_width(self, model: ModelSpec) -> int:
        """Elements of a token's queries on one rank."""
        return model.heads // self.tp * model.head_dim

    def kv_width(self, model: ModelSpec) -> int:
        """Elements of a token's keys on one rank, and of its values; shared heads are repeated, not split."""
        return -(-model.kv_heads // self.tp) * model.head_dim

    def ffn_width(self, model: ModelSpec) -> int:
        """Elements of a token inside of the MLP on one rank."""
        return -(-model.ffn // self.tp)

    def vocab_rows(self, model: ModelSpec) -> int:
        """Rows of embedding and head on one rank."""
        return -(-model.vocab // self.tp)


WHOLE = Sharding()
"""No tensor parallelism."""


@lru_cache(maxsize=4096)
def backbone_bytes(
    model: ModelSpec, layers: Layers, *, first: bool, last: bool, sharding: Sharding = WHOLE
) -> int:
    """Frozen weights of one rank of a stage; the embedding is on the first, norm and head on the last."""
    weights = sum(linear.in_features * linear.out_features for linear in model.linears)
    shard = sum(_shard_elements(model, linear, sharding) for linear in model.linears)
    parameters = count_layers(layers) * (model.layer_parameters - weights + shard)
    vocabulary = model.vocab * model.hidden
    for held, all_parameters in ((first, model.embedding_parameters), (last, model.head_parameters)):
        if held:
            parameters += all_parameters - vocabulary + sharding.vocab_rows(model) * model.hidden
    return parameters * model.dtype_bytes


def table_bytes(model: ModelSpec) -> int:
    """Cosines and sines of rotary positions, which every rank of every stage holds."""
    if model.learned_positions:
        return 0
    return _ROTARY_TABLES * row_slots(model.max_positions) * model.head_dim * model.dtype_bytes


@lru_cache(maxsize=4096)
def adapter_parameters(
    model: ModelSpec, layers: Layers, peft: PeftSpec, sharding: Sharding = WHOLE, *, first: bool = False
) -> int:
    """Trained parameters of one task on one rank of a stage; ``first`` where it embeds."""
    attached = stage_attachments(model.shard(sharding.tp), layers, peft, first=first)
    return sum(n * each.parameters for each, n in attached)


def adapter_dtype_bytes(model: ModelSpec) -> int:
    """Bytes of one adapter element; as in PEFT, float32 beside a bfloat16 backbone."""
    return max(model.dtype_bytes, FLOAT32_BYTES)


def _split_by_outputs(linear: LinearSpec) -> bool:
    return linear.reads in {"attention", "mlp"}


def _shard_elements(model: ModelSpec, linear: LinearSpec, sharding: Sharding) -> int:
    """Elements of one rank's part of a linear's weight."""
    whole_kv = model.kv_heads * model.head_dim
    if linear.reads == "attention" and linear.out_features == whole_kv:
        return linear.in_features * sharding.kv_width(model)
    if _split_by_outputs(linear):
        return linear.in_features * -(-linear.out_features // sharding.tp)
    return -(-linear.in_features // sharding.tp) * linear.out_features
