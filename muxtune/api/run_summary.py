"""What ``run`` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxtune.support.tables import format_table, show_bytes, show_percent, show_rate, show_seconds

if TYPE_CHECKING:
    from runtime import RunReport


def run_table(report: RunReport) -> str:
    """What a run took."""
    failed = sum(task.state == "failed" for task in report.tasks)
    rows = [
        ["iterations", f"{report.steps}"],
        *([["tasks failed", f"{failed} of {len(report.tasks)}"]] if failed else []),
        ["iteration", show_seconds(report.median_iteration_s)],
        ["tokens/s", show_rate(report.tokens_per_s)],
        ["billed tokens/s", show_rate(report.billed_tokens_per_s)],
        ["effective tokens/s", show_rate(report.effective_tokens_per_s)],
        *([] if report.mfu is None else [["MFU", show_percent(report.mfu)]]),
        ["busy per stage", ", ".join(map(show_percent, report.busy_fraction))],
        ["peak memory per stage", ", ".join(show_bytes(stage.peak_bytes) for stage in report.memory)],
    ]
    return format_table(["measured", ""], rows)
