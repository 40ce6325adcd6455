"""Floating-point operations per token, counted from the shapes of a backbone.

A multiplication with its addition counts as two. Matrix products are all that is counted: norms, activations,
rotary embedding, softmax, biases, residual additions, the cross-entropy and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.graph.operators import Phase
from muxtune.model import LAYER_INPUTS, ModelSpec
from muxtune.tasks import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token by what they are for, over all layers."""

    linears: float
    """Frozen linears of the layers."""
    attention: float
    """Scores, and their products with the values."""
    head: float
    adapters: float
    """Low-rank updates of the token's own task."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.linears + self.attention + self.head + self.adapters


def causal_context_tokens(sequence_tokens: int) -> float:
    """Keys that a token of a causal sequence attends to, itself included: the mean over the sequence."""
    return (sequence_tokens + 1) / 2


def flops_per_token(
    model: ModelSpec,
    phase: Phase,
    *,
    context_tokens: float,
    lora: LoraSpec | None = None,
    targets_per_token: float = 1.0,
) -> TokenFlops:
    """Floating-point operations of one token on its way through the whole backbone.

    The backward of PEFT: frozen linears, attention and head have gradients of their inputs only, so a linear
    costs as much as forward and attention twice as much (recomputed scores are not counted). Adapters have
    gradients of their weights too. Nothing before the first adapter of the first layer has a gradient; there,
    attention counts whole if any of its inputs has one.

    Args:
        model: The backbone.
        phase: ``fwd`` or ``bwd``.
        context_tokens: Keys that the token attends to (see :func:`causal_context_tokens`).
        lora: The adapter of the token's task; without one there is nothing to train, and no backward.
        targets_per_token: Share of tokens that are predicted; only those reach the head.
    """
    targets = () if lora is None else model.targeted_linears(lora.targets, "targets")
    r = 0 if lora is None else lora.r
    linear_flops = [2.0 * linear.in_features * linear.out_features for linear in model.linears]
    linears = model.layers * sum(linear_flops)
    attention = model.layers * 4.0 * context_tokens * model.heads * model.head_dim
    head = 2.0 * model.hidden * model.vocab * targets_per_token
    adapters = model.layers * sum(2.0 * r * (linear.in_features + linear.out_features) for linear in targets)
    if phase == "fwd":
        return TokenFlops(linears=linears, attention=attention, head=head, adapters=adapters)
    if not targets:
        return TokenFlops(linears=0.0, attention=0.0, head=0.0, adapters=0.0)
    first = min(linear.block for linear in targets)
    linears -= sum(f for linear, f in zip(model.linears, linear_flops, strict=True) if linear.block <= first)
    if first > LAYER_INPUTS.index("attention"):
        attention *= 1 - 1 / model.layers
    # The gradient of an input that nothing before it needs.
    unneeded = sum(2.0 * r * linear.in_features for linear in targets if linear.block == first)
    return TokenFlops(linears=linears, attention=2 * attention, head=head, adapters=2 * adapters - unneeded)
