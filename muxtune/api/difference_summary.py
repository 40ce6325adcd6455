"""What ``plan diff`` prints for people."""

from __future__ import annotations

import json

from muxtune.plan.difference import PlanDifference
from muxtune.plan.predicted import Predicted
from muxtune.support.tables import (
    format_table,
    show_bytes,
    show_difference,
    show_percent,
    show_rate,
    show_seconds,
)


def difference_table(difference: PlanDifference) -> str:
    """Decisions that differ, with both values, and both predictions."""
    rows = [[each.field, _shown(each.first), _shown(each.second)] for each in difference.decisions]
    decisions = format_table(["decision", "A", "B"], rows) if rows else "Both plans decide the same."
    return f"{decisions}\n\n{_predicted(difference.first, difference.second)}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _predicted(first: Predicted, second: Predicted) -> str:
    rows = [
        [name, show(here), show(there), show_difference(there, here) if here else "-"]
        for name, show, here, there in (
            ("iteration", show_seconds, first.iteration_s, second.iteration_s),
            ("tokens/s", show_rate, first.tokens_per_s, second.tokens_per_s),
            (
                "effective tokens/s",
                show_rate,
                first.effective_tokens_per_s,
                second.effective_tokens_per_s,
            ),
            ("bubble", show_percent, first.bubble_fraction, second.bubble_fraction),
            (
                "memory, fullest stage",
                show_bytes,
                max(first.peak_memory_bytes),
                max(second.peak_memory_bytes),
            ),
        )
    ]
    return format_table(["predicted", "A", "B", "B against A"], rows)
