"""Parts of a frozen decoder: embedding, layer, head with loss; each family fills them differently."""

# T tokens of the stream, D hidden size, N target tokens, V vocabulary, W a rank's part of it, K active tasks

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from muxtune.model import ModelSpec
from runtime.attention import RopeTables, causal_attention
from runtime.backbone.blocks import SiteAdapters
from runtime.backbone.linear import SharedLinear
from runtime.data.batch import MicrobatchTensors
from runtime.distributed.sharding import WHOLE, Shard, linear_portions
from runtime.distributed.tensor_parallel import select_rows, shared, split_nll
from runtime.ops.elementwise import LayerNorm, RmsNorm, find_activation, find_gated_activation
from runtime.peft import frozen_linear

Norm = RmsNorm | LayerNorm


class Embedding(nn.Module):
    """Token embedding, with learned positions where the family has them.

    Args:
        tokens_VD: A row per token; the rank's part of them is kept.
        positions_PD: A row per position.
        position_offset: Row of position 0.
        shard: Place of the rank among those that share the stage.
    """

    def __init__(
        self,
        tokens_VD: Tensor,
        positions_PD: Tensor | None = None,
        position_offset: int = 0,
        *,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__()
        self._shard = shard
        self._first, stop = shard.span(len(tokens_VD))
        self.tokens_WD = _frozen(tokens_VD[self._first : stop])
        self.positions_PD = None if positions_PD is None else _frozen(positions_PD)
        self._position_offset = position_offset

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """``[T, D]``.

        Args:
            tokens_T: Ids of the tokens.
            positions_T: Their positions.
            change: What adapters make of the embedded tokens; positions come on top of it.
        """
        hidden_TD = select_rows(tokens_T, self.tokens_WD, self._first, self._shard)
        if change is not None:
            hidden_TD = change(hidden_TD)
        if self.positions_PD is not None:
            hidden_TD += self.positions_PD[self._position_offset :].index_select(0, positions_T)
        return hidden_TD


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals.

    Args:
        attention_norm: Norm before the attention.
        qkv: Queries, keys and values side by side.
        attention_out: Projection of the attended values.
        mlp_norm: Norm before the MLP.
        mlp_in: First linear of the MLP, or gate and up-projection side by side.
        mlp_out: Last linear of the MLP.
        spec: The backbone, whole: its heads and its activation.
        rope: Shared by all layers of a stage; None for learned positions.
        shard: Part of the linears that these are.
    """

    def __init__(
        self,
        *,
        attention_norm: Norm,
        qkv: SharedLinear,
        attention_out: SharedLinear,
        mlp_norm: Norm,
        mlp_in: SharedLinear,
        mlp_out: SharedLinear,
        spec: ModelSpec,
        rope: RopeTables | None,
        shard: Shard,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.qkv, self.attention_out = qkv, attention_out
        self.mlp_in, self.mlp_out = mlp_in, mlp_out
        find = find_gated_activation if spec.gated else find_activation
        self.activation = find(spec.activation)
        own = spec.shard(shard.ranks)
        self.heads, self.kv_heads = own.heads, own.kv_heads
        self.rope = rope
        self._shard = shard
        self.linears = {
            name: linear for linear in (qkv, attention_out, mlp_in, mlp_out) for name in linear.columns
        }
        """The linear that holds each path of the layer, e.g. ``self_attn.q_proj``."""
        self.blocks = {"attention": SiteAdapters(), "mlp": SiteAdapters()}
        """Adapters on whole blocks."""
        self.keys_values = SiteAdapters()
        """Adapters with keys and values in front."""

    def forward(self, x_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """Hidden states after the layer."""
        shard = self._shard
        # What has no name here is freed as soon as nobody needs it.
        normed_TD = self.attention_norm.forward(x_TD)
        qkv_TF = self.qkv.forward(shared(normed_TD, shard), batch)
        block = self.blocks["attention"]
        read_TD = normed_TD if block.present(batch) else None
        del normed_TD
        attended = causal_attention(
            qkv_TF,
            batch.attention,
            self.heads,
            self.kv_heads,
            self.rope,
            self,
            in_front=self.keys_values.keys_values(batch),
        )
        update_TD = self.attention_out.forward(attended, batch)
        if read_TD is not None:
            update_TD = block.aggregate(update_TD, read_TD, batch)
        x_TD, normed_TD = self.mlp_norm.add(x_TD, update_TD)
        del update_TD
        inner = self.activation(self.mlp_in.forward(shared(normed_TD, shard), batch))
        update_TD = self.mlp_out.forward(inner, batch)
        return x_TD + self.blocks["mlp"].aggregate(update_TD, normed_TD, batch)


class Head(nn.Module):
    """Final norm, head and loss, at the target positions only.

    Args:
        norm: Norm before the head.
        weight_VD: A row per token; the rank's part of them is kept.
        shard: Place of the rank among those that share the stage.
    """

    def __init__(self, norm: Norm, weight_VD: Tensor, *, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.norm = norm
        self._shard = shard
        self._first, stop = shard.span(len(weight_VD))
        self.weight_WD = _frozen(weight_VD[self._first : stop])

    def forward(self, hidden_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """Sum of the negative log-likelihoods of each active task, ``[K]``."""
        nll_N = self.target_nll(hidden_TD, batch.target_rows_N, batch.target_ids_N)
        return torch.stack([nll_N[start:stop].sum() for start, stop in batch.target_spans])

    def target_nll(self, hidden_TD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
        """Negative log-likelihood of each target, ``[N]``; in float32 for a bfloat16 backbone."""
        # Norm and head act on each token alone, so the rows can be selected first.
        normed_ND = shared(self.norm.forward(hidden_TD.index_select(0, rows_N)), self._shard)
        logits_NW = frozen_linear(normed_ND, self.weight_WD, static_shape=False)
        if logits_NW.dtype == torch.bfloat16:
            logits_NW = logits_NW.float()
        if self._shard.team is not None:
            return split_nll(logits_NW, ids_N, self._first, self._shard.team)
        return F.cross_entropy(logits_NW, ids_N, reduction="none")


class Weights(Protocol):
    """Tensors of a backbone under transformers' names; its whole model is one."""

    def get_parameter(self, target: str, /) -> Tensor:
        """The tensor of this name, in the backbone's dtype; the caller copies what it keeps."""


def layer_norm(spec: ModelSpec, weights: Weights, path: str) -> LayerNorm:
    """Copy of the layer norm at a path of the model."""
    weight, bias = (weights.get_parameter(f"{path}.{name}") for name in ("weight", "bias"))
    return LayerNorm(weight, bias, spec.norm_eps)


def shared_linear(spec: ModelSpec, weights: Weights, layer: int, *paths: str, shard: Shard) -> SharedLinear:
    """The rank's part of the linears at these paths of a layer, which read the same input."""
    parts: dict[str, Tensor] = {}
    biases: list[Tensor] = []
    by_name = {linear.name: linear for linear in spec.linears}
    for path in paths:
        source, linear = f"{spec.layer_prefix}.{layer}.{path}", by_name[path]
        outputs, inputs = linear_portions(spec, linear, shard)
        weight_OI = weights.get_parameter(f"{source}.weight").detach()
        if spec.transposed_weights:  # Conv1D keeps [in, out]; the rows of a linear are its outputs
            weight_OI = weight_OI.t()
        parts[path] = inputs.take(outputs.take(weight_OI)).contiguous()
        if spec.has_bias(linear):
            biases.append(outputs.take(weights.get_parameter(f"{source}.bias").detach()))
    by_outputs = by_name[paths[0]].split_by_outputs
    return SharedLinear(parts, biases, sums=WHOLE if by_outputs else shard)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
