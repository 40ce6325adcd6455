from __future__ import annotations

from muxtune.api.validation_summary import explanation_text
from muxtune.validation import DifferencePart, IterationExplanation, SlowIteration

SLOWEST = SlowIteration(
    step=7, seconds=0.15, excess_s=0.04, stage=1, action="B0.14", place="before", place_excess_s=0.035
)


def part(cause: str, seconds: float, meaning: str) -> DifferencePart:
    return DifferencePart(cause=cause, stage=None, seconds=seconds, meaning=meaning)


def test_small_parts_are_one_row_and_the_rest_is_always_shown():
    explanation = IterationExplanation(
        predicted_s=0.1,
        measured_s=0.11,
        parts=(
            part("messages", 0.012, "messages are late"),
            part("between", -0.0021, "less between"),
            part("variation", 4e-4, "uneven"),
            part("schedule", -4e-4, "a window"),
            part("rest", 1e-4, "not explained"),
        ),
    )
    lines = explanation_text(explanation, SLOWEST).splitlines()
    assert lines[0] == "An iteration takes 110.0 ms (median), predicted 100.0 ms: +10.0 ms. That is:"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert cells == [
        ["+12.0 ms", "messages are late"],
        ["-2.1 ms", "less between"],
        ["+100 us", "not explained"],
        ["+0 us", "2 parts below 0.5% of an iteration each"],
    ]
    assert lines[-1] == (
        "The slowest steady iteration, 7, took 150.0 ms (+40.0 ms to the median); "
        "most was lost before B0.14 on stage 1, +35.0 ms."
    )
