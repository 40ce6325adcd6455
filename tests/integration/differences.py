"""How far two trainings of a task are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a task is from its solo run, or how far it may be."""

    loss: float
    """|difference| / |loss|, largest over the steps."""
    update: float
    """||difference|| / ||final - initial||, over all tensors of the adapter."""
    element: float
    """|difference|, largest over all elements of the adapter."""

    def share_of(self, limit: Difference) -> float:
        """Of the measures' shares of their limits the largest; 1 is just within."""
        shares = (self.loss / limit.loss, self.update / limit.update, self.element / limit.element)
        return math.nan if any(map(math.isnan, shares)) else max(shares)


STRICT = Difference(loss=1e-9, update=1e-9, element=1e-9)
"""float64: only the order of sums differs.

LlamaRMSNorm rounds its input to float32 in every dtype, so two values 1e-16 apart may come out 6e-8 apart.
A task that misses the limit by little may have met such a rounding: it depends on the order of sums, and so
on the processor.
"""

ROUNDED = Difference(loss=1e-5, update=1e-3, element=float("inf"))
"""float32: only the order of sums, but AdamW amplifies the rounding of tiny gradients.

Allowed in any case; more is where peft itself is further from itself, see :func:`float32_limit`.
"""

NEXT_TO_ITSELF = 2.0
"""In float32, how much further from the solo run a run may be than peft is from itself."""

CREDIBLE = Difference(loss=0.01, update=0.1, element=float("inf"))
"""Peft further from itself than this is no measure for anything: the case has to be another one."""

KINKED = Difference(loss=2e-3, update=0.1, element=float("inf"))
"""float32 and ReLU: rounding puts a unit next to zero on the other side, and its gradient comes or goes.

Peft differs as much from itself: over ten movements of opt-tiny's weights by half a unit in the last place,
each of twenty steps, losses by up to 2e-4 and updates by up to 2e-2, and by 1e-7 and 1e-5 where none was hit.
"""

BFLOAT16_EPSILON = 2.0**-8
"""Distance from 1 to the next bfloat16."""

NEXT_TO_SOLO = 2.0
"""In bfloat16, how much further than the solo run a run may be from the same training in float64.

Both are walks of independent roundings of one size, so their distances scatter about one value: quotients of
0.5 to 1.8 were seen, and one of 2.1 where ``tp`` ranks round their partial sums before these are added.
"""


def bfloat16_limit(solo: Difference) -> Difference:
    """How far a run may be from a training in float64, where the solo run in bfloat16 is so far.

    A task whose solo run happens to come close is given the epsilon of a weight for its update. Its loss is a
    mean over a dozen targets and more, with a rounding in each logit: an eighth of the epsilon.
    """
    return Difference(
        loss=NEXT_TO_SOLO * solo.loss + BFLOAT16_EPSILON / 8,
        update=NEXT_TO_SOLO * solo.update + BFLOAT16_EPSILON,
        element=float("inf"),
    )


def float32_limit(backbone: str, spread: Difference) -> Difference:
    """How far a run in float32 may be from the solo run.

    Args:
        backbone: Preset, or name of a directory.
        spread: Difference of peft from itself, see :attr:`SoloTask.one_batch`.
    """
    assert spread.share_of(CREDIBLE) <= 1, f"peft is {spread} from itself"  # nor may it be a NaN
    floor = KINKED if backbone in {"opt", "opt-tiny"} else ROUNDED
    return Difference(
        loss=max(floor.loss, NEXT_TO_ITSELF * spread.loss),
        update=max(floor.update, NEXT_TO_ITSELF * spread.update),
        element=float("inf"),
    )


def compare_results(
    losses: list[float],
    adapter: Mapping[str, Tensor],
    reference_losses: list[float],
    reference: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
) -> Difference:
    """Difference of two trainings of a task that started from the same adapter."""
    assert adapter.keys() == reference.keys() == initial.keys()
    trained = [key for key, tensor in reference.items() if tensor.is_floating_point()]
    for key in adapter.keys() - set(trained):  # places of entries
        assert adapter[key].equal(initial[key]), key
        assert adapter[key].equal(reference[key]), key
    apart = [(adapter[key] - reference[key]).double() for key in trained]
    updates = [(reference[key] - initial[key]).double() for key in trained]
    assert all(bool(update.any()) for update in updates), "every tensor of the adapter is trained"
    return Difference(
        loss=max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses, strict=True)),
        update=_norm(apart) / _norm(updates),
        element=max(float(each.abs().max()) for each in apart),
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5
