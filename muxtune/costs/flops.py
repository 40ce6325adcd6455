"""Floating-point operations per token, counted from the shapes of a backbone.

A multiplication with its addition counts as two. Matrix products are all that is counted: norms, activations,
rotary embedding, softmax, biases, residual additions, the cross-entropy and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.costs.operator_work import operator_work
from muxtune.model import LAYER_INPUTS, ModelSpec
from muxtune.operators import Phase
from muxtune.peft import (
    PeftSpec,
    Step,
    attachments,
    backward_layers,
    depth_of,
    needs_backward,
    stage_attachments,
    stage_layers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token by what they are for, over all layers."""

    linears: float
    """Frozen linears of the layers."""
    attention: float
    """Scores, and their products with the values."""
    head: float
    adapters: float
    """Adapters of the token's own task."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.linears + self.attention + self.head + self.adapters


def flops_per_token(
    model: ModelSpec,
    phase: Phase,
    *,
    context_tokens: float,
    peft: PeftSpec | None = None,
    targets_per_token: float = 1.0,
) -> TokenFlops:
    """Floating-point operations of one token on its way through the whole backbone.

    The backward of PEFT: frozen linears, attention and head have gradients of their inputs only, so a linear
    costs as much as forward and attention twice as much (recomputed scores are not counted). Adapters have
    gradients of their weights too. Nothing before the first trained thing has a gradient; there, attention
    counts whole if any of its inputs has one.

    Args:
        model: The backbone.
        phase: ``fwd`` or ``bwd``.
        context_tokens: Keys that the token attends to; in a causal sequence, half of it on average.
        peft: The method of the token's task; without one there is nothing to train, and no backward.
        targets_per_token: Share of tokens that are predicted; only those reach the head.
    """
    linear_flops = [2.0 * linear.in_features * linear.out_features for linear in model.linears]
    attention = 4.0 * context_tokens * model.heads * model.head_dim
    head = 2.0 * model.hidden * model.vocab * targets_per_token
    specs = () if peft is None else (peft,)
    layers = stage_layers(model, specs, 0, model.layers)
    attached = [pair for spec in specs for pair in stage_attachments(model, layers, spec, first=True)]
    adapters = sum(n * operator_work(each.adapter.at(1), phase, model).flops for each, n in attached)
    if phase == "fwd":
        linears = model.layers * sum(linear_flops)
        return TokenFlops(
            linears=linears, attention=model.layers * attention, head=head, adapters=float(adapters)
        )
    if not attached:
        return TokenFlops(linears=0.0, attention=0.0, head=0.0, adapters=0.0)
    whole, begin, depth = backward_layers(model, specs, layers, first=True)
    count = sum(n for _, n in whole)
    linears, attentions = count * sum(linear_flops), float(count)
    if begin is not None:
        needed = zip(model.linears, linear_flops, strict=True)
        linears += sum(f for each, f in needed if needs_backward(depth_of(each.block, Step.LINEAR), depth))
        attentions += needs_backward(depth_of(LAYER_INPUTS.index("attended"), Step.BEGIN), depth)
        # The gradient of an input that nothing before it needs.
        own = (each for spec in specs for each in attachments(spec, model, begin[0]))
        adapters -= sum(each.input_flops for each in own if each.depth == depth)
    return TokenFlops(
        linears=linears, attention=2 * attentions * attention, head=head, adapters=float(adapters)
    )
