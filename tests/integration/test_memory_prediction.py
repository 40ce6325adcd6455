"""Predicted memory of a stage against what real ranks count and allocate."""

from __future__ import annotations

import pytest

from benchmarks.helpers.memory_trace import traced_peaks
from benchmarks.memory import MemoryCase, count_case, plan_case
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.exact.bytes import plan_memory

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("quick_ranks")]

STEPS = 2


@pytest.mark.parametrize(
    "case",
    [
        MemoryCase(
            "llama-tiny", "muxtune", PlanOptions(alignment="pack", template="continuous", pp=2), tasks=3
        ),
        MemoryCase("gpt2-tiny", "nemo", PlanOptions(alignment="pad", template="flush", pp=1), tasks=2),
    ],
    ids=str,
)
def test_the_peak_of_every_stage_is_predicted_within_5_percent(case):
    plan = plan_case(case, steps=STEPS)
    predicted = plan.predicted.peak_memory_bytes
    assert [memory.total_bytes for memory in plan_memory(plan)] == list(predicted)
    counted = [memory.peak_bytes for memory in count_case(plan, steps=STEPS)]
    assert counted == pytest.approx(predicted, rel=0.05)
    assert traced_peaks(plan, steps=STEPS) == pytest.approx(predicted, rel=0.05)
