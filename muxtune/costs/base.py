"""What a planner asks of operator costs."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from muxtune.costs.ref import CostsRef
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.graph.layer import Launching
from muxtune.graph.operators import Operator, Phase


class CostModel(Protocol):
    """Latency of operators on one device: all that estimates, exact prices and simulations ask.

    Whoever inherits from it has to say ``ref``, ``latency_s``, ``action_s``, ``shard`` and ``exploring``; the
    rest follows from these. Prices must not change while something is planned with them. Costs that are those
    of another model with a term changed are a :class:`muxtune.costs.wrapped.WrappedCosts`.
    """

    @property
    def ref(self) -> CostsRef:
        """Identity of these costs, for the plan."""
        ...

    @property
    def contention(self) -> float | None:
        """While a rank computes and communicates, each runs at rate ``1 / (1 + contention)``.

        None if nobody measured it on this device.
        """
        return None

    @property
    def attention(self) -> AttentionName:
        """Backend of attention that a run should use, and that attention is priced with."""
        return DEFAULT_ATTENTION

    @property
    def largest_group(self) -> int | None:
        """Ranks of the largest collective that these costs know; None where they know any."""
        return None

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator."""
        ...

    def group_latency_s(self, ops: Sequence[Operator], phase: Phase) -> float:
        """Seconds of the adapters of several tasks at one linear, which may share a launch."""
        return sum(self.latency_s(op, phase) for op in ops)

    def linear_latencies_s(
        self, in_features: int, out_features: int, tokens: NDArray[np.int64], phase: Phase
    ) -> NDArray[np.float64]:
        """Seconds of a frozen product at many numbers of tokens; equals :meth:`latency_s` of each.

        A search asks for thousands of them; who can price them together faster may.
        """
        ops = [Operator("linear", (in_features, out_features, size)) for size in tokens.tolist()]
        return np.array([self.latency_s(op, phase) for op in ops])

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action whose operators sum up to ``operators_s``: these, and a fixed cost."""
        ...

    def shard(self, tp: int) -> Self:
        """Costs of one of ``tp`` tensor-parallel ranks, which has its shard of the backbone.

        The identity stays that of the whole.

        Raises:
            SpecError: The backbone cannot be split into so many parts.
        """
        ...

    def of_kinds(self, kinds: Set[str]) -> Self:
        """These costs without what they know of other kinds of operators, in prices and identity.

        Plans are made with the costs of what their tasks run, so that a plan does not depend on what else was
        ever measured.
        """
        return self

    def with_adapters(self, launching: Launching) -> Self:
        """Costs on the same device with adapters launched in that way; these costs where both run alike.

        Separate ones are operations of their own, as PEFT runs them.
        """
        return self

    def noting(self) -> AbstractContextManager[list[str]]:
        """What is doubtful about the prices that are asked for inside, for the plan that has them.

        The list is filled when the block ends: sentences without the final stop; empty where nothing is.
        """
        return nullcontext([])

    def exploring(self) -> AbstractContextManager[None]:
        """Where a search prices candidates: shapes that were not measured go without a warning inside."""
        ...
