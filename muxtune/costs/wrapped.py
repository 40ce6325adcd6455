"""Costs with a term of one's own: other costs, and what is changed about them."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from typing import Self

import numpy as np
from numpy.typing import NDArray

from muxtune.costs.base import CostModel
from muxtune.costs.identity import own_ref
from muxtune.costs.ref import CostsRef
from muxtune.graph.attention_backends import AttentionName
from muxtune.graph.layer import Launching
from muxtune.graph.operators import Operator, Phase

_SAMPLED_S = 1e-3
"""Price of the costs inside, where the identity asks what is made of it."""


class WrappedCosts(CostModel):
    """The costs ``inner``, with :meth:`launch_s` or :meth:`fixed_s` changed by a subclass.

    Whoever asks for prices gets the changed ones: the search, estimates, exact prices, simulations, shards
    and costs with other adapters. Wrapped costs can be wrapped again. A subclass may be a dataclass.
    """

    inner: CostModel
    """Costs that are changed."""

    def __init__(self, inner: CostModel) -> None:
        self.inner = inner

    def launch_s(self, ops: tuple[Operator, ...], phase: Phase, seconds: float) -> float:
        """Seconds of one launch, where the costs inside say ``seconds``; 0 must stay 0.

        Args:
            ops: What is launched: one operator, or the adapters of several tasks at one linear.
            phase: Phase of the action; always ``fwd`` for links, the embedding, the optimizer and the feed.
            seconds: Price by the costs inside.
        """
        return seconds

    def fixed_s(self, phase: Phase) -> float:
        """Seconds that every action takes beyond those of the costs inside."""
        return 0.0

    @property
    def ref(self) -> CostsRef:
        """Identity of the costs inside, changed by the class, its settings and what it makes of prices."""

        def sampled_s(op: Operator, phase: Phase) -> float:
            return self.launch_s((op,), phase, _SAMPLED_S) + self.fixed_s(phase)

        return own_ref(self, self.inner.ref, sampled_s)

    @property
    def contention(self) -> float | None:
        """Value of the costs inside."""
        return self.inner.contention

    @property
    def attention(self) -> AttentionName:
        """Value of the costs inside."""
        return self.inner.attention

    @property
    def largest_group(self) -> int | None:
        """Value of the costs inside."""
        return self.inner.largest_group

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator."""
        return self.launch_s((op,), phase, self.inner.latency_s(op, phase))

    def group_latency_s(self, ops: Sequence[Operator], phase: Phase) -> float:
        """Seconds of the adapters of several tasks at one linear."""
        return self.launch_s(tuple(ops), phase, self.inner.group_latency_s(ops, phase))

    def linear_latencies_s(
        self, in_features: int, out_features: int, tokens: NDArray[np.int64], phase: Phase
    ) -> NDArray[np.float64]:
        """Seconds of a frozen product at many numbers of tokens."""
        inner_s = self.inner.linear_latencies_s(in_features, out_features, tokens, phase).tolist()
        ops = [Operator("linear", (in_features, out_features, size)) for size in tokens.tolist()]
        pairs = zip(ops, inner_s, strict=True)
        return np.array([self.launch_s((op,), phase, seconds) for op, seconds in pairs])

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action."""
        return self.inner.action_s(operators_s, phase) + self.fixed_s(phase)

    def shard(self, tp: int) -> Self:
        """This change around the costs of one of ``tp`` ranks."""
        return self._around(self.inner.shard(tp))

    def of_kinds(self, kinds: Set[str]) -> Self:
        """This change around the costs of these kinds alone."""
        return self._around(self.inner.of_kinds(kinds))

    def with_adapters(self, launching: Launching) -> Self:
        """This change around costs with adapters launched in that way."""
        return self._around(self.inner.with_adapters(launching))

    def noting(self) -> AbstractContextManager[list[str]]:
        """What is doubtful about the costs inside."""
        return self.inner.noting()

    def exploring(self) -> AbstractContextManager[None]:
        """Context of the costs inside: a search prices candidates in it."""
        return self.inner.exploring()

    def _around(self, inner: CostModel) -> Self:
        if inner is self.inner:
            return self
        wrapped = copy.copy(self)
        object.__setattr__(wrapped, "inner", inner)  # a frozen dataclass, too
        return wrapped
