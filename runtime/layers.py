"""Parts of a frozen decoder: embedding, layer, head with loss; each family fills them differently."""

# T tokens of the stream, D hidden size, N target tokens, V vocabulary, K active tasks

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from runtime.attention import RopeTables, causal_attention
from runtime.batch import MicrobatchTensors
from runtime.elementwise import Activation, LayerNorm, RmsNorm
from runtime.lora import SharedLinear, lora_linear

Norm = RmsNorm | LayerNorm


class Embedding(nn.Module):
    """Token embedding, with learned positions where the family has them.

    Args:
        tokens_VD: A row per token.
        positions_PD: A row per position.
        position_offset: Row of position 0.
    """

    def __init__(
        self, tokens_VD: Tensor, positions_PD: Tensor | None = None, position_offset: int = 0
    ) -> None:
        super().__init__()
        self.tokens_VD = _frozen(tokens_VD)
        self.positions_PD = None if positions_PD is None else _frozen(positions_PD)
        self._position_offset = position_offset

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """``[T, D]``."""
        hidden_TD = self.tokens_VD.index_select(0, tokens_T)
        if self.positions_PD is not None:
            hidden_TD += self.positions_PD[self._position_offset :].index_select(0, positions_T)
        return hidden_TD


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals.

    Args:
        attention_norm: Before the attention.
        qkv: Queries, keys and values side by side.
        attention_out: Projection of the attended values.
        mlp_norm: Before the MLP.
        mlp_in: First linear of the MLP, or gate and up-projection side by side.
        mlp_out: Last linear of the MLP.
        activation: From the outputs of ``mlp_in`` to the inputs of ``mlp_out``.
        heads: Query heads.
        kv_heads: Key and value heads.
        rope: Shared by all layers of a stage; None for learned positions.
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
        activation: Activation,
        heads: int,
        kv_heads: int,
        rope: RopeTables | None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.qkv, self.attention_out = qkv, attention_out
        self.mlp_in, self.mlp_out = mlp_in, mlp_out
        self.activation = activation
        self.heads, self.kv_heads = heads, kv_heads
        self.rope = rope
        self.linears = {
            name: linear for linear in (qkv, attention_out, mlp_in, mlp_out) for name in linear.columns
        }
        """The linear that holds each path of the layer, e.g. ``self_attn.q_proj``."""

    def forward(self, x_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """Hidden states after the layer."""
        spans, ids = batch.spans, batch.task_ids
        qkv_TF = self.qkv.forward(self.attention_norm.forward(x_TD), spans, ids)
        attended = causal_attention(qkv_TF, batch.attention, self.heads, self.kv_heads, self.rope)
        x_TD, normed_TD = self.mlp_norm.add(x_TD, self.attention_out.forward(attended, spans, ids))
        inner = self.activation(self.mlp_in.forward(normed_TD, spans, ids))
        return x_TD + self.mlp_out.forward(inner, spans, ids)


class Head(nn.Module):
    """Final norm, head and loss, at the target positions only."""

    def __init__(self, norm: Norm, weight_VD: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.weight_VD = _frozen(weight_VD)

    def forward(self, hidden_TD: Tensor, batch: MicrobatchTensors) -> Tensor:
        """Sum of the negative log-likelihoods of each active task, ``[K]``."""
        nll_N = self.target_nll(hidden_TD, batch.target_rows_N, batch.target_ids_N)
        return torch.stack([nll_N[start:stop].sum() for start, stop in batch.target_spans])

    def target_nll(self, hidden_TD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
        """Negative log-likelihood of each target, ``[N]``; in float32 for a bfloat16 backbone."""
        # Norm and head act on each token alone, so the rows can be selected first.
        normed_ND = self.norm.forward(hidden_TD.index_select(0, rows_N))
        logits_NV = lora_linear(normed_ND, self.weight_VD, None, (), (), static_shape=False)
        if logits_NV.dtype == torch.bfloat16:
            logits_NV = logits_NV.float()
        return F.cross_entropy(logits_NV, ids_N, reduction="none")


def layer_norm(source: nn.LayerNorm) -> LayerNorm:
    """Copy of a layer norm."""
    return LayerNorm(source.weight, source.bias, source.eps)


def shared_linear(layer: nn.Module, *paths: str) -> SharedLinear:
    """The linears at these paths of a transformers layer, which read the same input, as one."""
    linears: dict[str, Any] = {path: layer.get_submodule(path) for path in paths}
    return SharedLinear(
        {path: linear.weight.detach() for path, linear in linears.items()},
        [linear.bias.detach() for linear in linears.values() if linear.bias is not None],
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
