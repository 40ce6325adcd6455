"""Model FLOP utilization: what the users' own tokens need, over what the ranks could compute meanwhile.

Useful are the multiplications and additions of matrix products that the tokens of the examples need, in
forward and backward: frozen linears, causal attention within each sequence, the head at predicted tokens, and
the token's own adapter (:mod:`muxtune.costs.flops`). Frozen weights have no gradients, so a backward is about
as long as a forward. Padding, recomputation, norms, the optimizer and all else are not useful, whatever time
they take. The mean over the steps of every task; an iteration has one step of each.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxtune.costs.flops import flops_per_token
from muxtune.model import ModelSpec
from muxtune.operators import PHASES
from muxtune.tasks import TaskData


def useful_flops(model: ModelSpec, data: Iterable[TaskData]) -> float:
    """Floating-point operations of an iteration that the tokens of the tasks' examples need."""
    return sum(_step_flops(model, each) for each in data)


def _step_flops(model: ModelSpec, data: TaskData) -> float:
    tokens = data.step_tokens
    per_token = (
        flops_per_token(
            model,
            phase,
            context_tokens=data.step_keys / tokens,
            peft=data.task.peft,
            targets_per_token=data.step_targets / tokens,
        )
        for phase in PHASES
    )
    return tokens * sum(each.total for each in per_token)
