"""What the front door's calls return: results that show themselves, in a notebook and as text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from muxtune.api.plan_summary import plan_summary, predicted_table
from muxtune.api.run_summary import run_table
from muxtune.api.show import Shown
from muxtune.api.validation_summary import validation_table
from muxtune.plan import Decisions, HTask, Plan, Predicted, save_plan
from muxtune.support.tables import format_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from experiments.comparison import Comparison
    from experiments.sweep import SweepSummary
    from muxtune.costs.profile import Profile
    from muxtune.model import ModelSpec
    from runtime import RunReport, ValidationReport
    from sim import SimulationReport


_RATES = ("iteration_s", "tokens_per_s", "billed_tokens_per_s", "effective_tokens_per_s")
"""What is predicted and measured under the same names."""


@dataclass(frozen=True)
class Planned(Shown):
    """A plan. As a frame: one row per hTask."""

    plan: Plan

    @property
    def decisions(self) -> Decisions:
        """All that was decided, and may be edited."""
        return self.plan.decisions

    @property
    def htasks(self) -> tuple[HTask, ...]:
        """Tasks that go through the backbone as one stream each, with what follows for them."""
        return tuple(self.plan.htasks)

    @property
    def predicted(self) -> Predicted:
        """What the simulator expects of it."""
        return self.plan.predicted

    @cached_property
    def text(self) -> str:
        """What ``muxtune plan`` prints; reads the datasets."""
        return plan_summary(self.plan)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write plan.json.

        Raises:
            OutputError: It cannot be written.
        """
        save_plan(self.plan, Path(path))
        return Path(path)

    def to_frame(self) -> pd.DataFrame:
        """One row per hTask: tasks, bucket, alignment, micro-batches and their tokens."""
        import pandas as pd

        bucket_of = {htask: number for number, bucket in enumerate(self.plan.buckets) for htask in bucket}
        rows = [
            {
                "htask": htask.id,
                "tasks": list(htask.task_ids),
                "bucket": bucket_of[htask.id],
                "alignment": htask.alignment,
                "chunk_tokens": htask.chunk_tokens,
                "microbatches": htask.microbatches,
                "tokens_per_microbatch": htask.tokens_per_microbatch,
            }
            for htask in self.plan.htasks
        ]
        return pd.DataFrame(rows).set_index("htask")

    def plot(self) -> Figure:
        """The simulated timeline."""
        from experiments.gantt import plan_figure

        return plan_figure(self.plan)


@dataclass(frozen=True)
class Simulated(Shown):
    """What a plan would do. As a frame: one row per action of a stage."""

    plan: Plan
    report: SimulationReport

    @property
    def predicted(self) -> Predicted:
        """The numbers, with the keys of ``predicted`` in the plan."""
        return self.report.predicted

    @cached_property
    def text(self) -> str:
        """What ``muxtune simulate`` prints."""
        return predicted_table(self.predicted, self.plan)

    def to_frame(self) -> pd.DataFrame:
        """One row per span of the timeline, in seconds from its start."""
        import pandas as pd

        return pd.DataFrame(
            {
                "stage": span.stage,
                "stream": span.stream,
                "kind": span.action.kind,
                "htask": span.action.htask,
                "number": span.action.number,
                "start_s": span.start_s,
                "end_s": span.end_s,
            }
            for span in self.report.spans
        )

    def save_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write the timeline as a Chrome/Perfetto trace.

        Raises:
            OutputError: It cannot be written.
        """
        self.report.save_trace(Path(path))
        return Path(path)

    def plot(self) -> Figure:
        """The timeline."""
        from experiments.gantt import plan_figure

        return plan_figure(self.plan)


@dataclass(frozen=True)
class Executed(Shown):
    """A run. As a frame: one row per iteration."""

    plan: Plan
    run_dir: Path
    report: RunReport

    @cached_property
    def text(self) -> str:
        """What ``muxtune run`` prints."""
        return run_table(self.report)

    def to_frame(self) -> pd.DataFrame:
        """One row per iteration of the last start: seconds, and whether it counts for the medians."""
        import pandas as pd

        first, steady = self.report.first_step, set(self.report.steady_steps)
        rows = [
            {"step": first + i, "iteration_s": seconds, "steady": first + i in steady}
            for i, seconds in enumerate(self.report.iteration_s)
        ]
        return pd.DataFrame(rows).set_index("step")

    def plot(self) -> Figure:
        """The simulated timeline above the measured one."""
        from experiments.gantt import plan_figure

        return plan_figure(self.plan, run_dir=self.run_dir)


@dataclass(frozen=True)
class Validated(Shown):
    """A run beside its prediction and beside solo training. As a frame: one row per task."""

    plan: Plan
    run_dir: Path
    report: ValidationReport

    @cached_property
    def text(self) -> str:
        """What ``muxtune validate`` prints."""
        return validation_table(self.report)

    def to_frame(self) -> pd.DataFrame:
        """One row per task: losses, and how far they and its adapter are from training alone."""
        import pandas as pd

        return pd.DataFrame([task.model_dump() for task in self.report.tasks]).set_index("task_id")

    def plot(self) -> Figure:
        """The simulated timeline above the measured one."""
        from experiments.gantt import plan_figure

        return plan_figure(self.plan, run_dir=self.run_dir)


@dataclass(frozen=True)
class Compared(Shown):
    """Policies on one workload. As a frame: one row per policy."""

    comparison: Comparison
    title: str

    @cached_property
    def text(self) -> str:
        """What ``muxtune compare`` prints."""
        from experiments.comparison import comparison_table

        return comparison_table(self.comparison)

    def to_frame(self) -> pd.DataFrame:
        """One row per policy: predictions, speed-up over the baseline, and measurements where it was run."""
        import pandas as pd

        rows = []
        for result in self.comparison.policies:
            row: dict[str, object] = {"policy": result.policy, "refused": result.refused}
            if result.parallelism is not None:
                row |= {key: getattr(result.parallelism, key) for key in ("tp", "pp", "dp")}
                row |= {"htasks": len(result.htasks), "template": result.template}
            for prefix, numbers in (("", result.predicted), ("measured_", result.measured)):
                if numbers is not None:
                    for name in (
                        "iteration_s",
                        "tokens_per_s",
                        "billed_tokens_per_s",
                        "effective_tokens_per_s",
                    ):
                        row[prefix + name] = getattr(numbers, name)
                    row[f"{prefix}peak_memory_bytes"] = max(numbers.peak_memory_bytes)
            row["speedup"] = self.comparison.predicted_speedup.get(result.policy)
            if self.comparison.measured_speedup:
                row["measured_speedup"] = self.comparison.measured_speedup.get(result.policy)
            rows.append(row)
        return pd.DataFrame(rows).set_index("policy")

    def plot(self) -> Figure:
        """Throughput and memory, a bar per policy."""
        from experiments.comparison_picture import comparison_figure

        return comparison_figure(self.comparison, title=self.title)


@dataclass(frozen=True)
class Swept(Shown):
    """Many plans. As a frame: one row per point."""

    summary: SweepSummary

    @cached_property
    def text(self) -> str:
        """What ``muxtune sweep`` prints."""
        from experiments.sweep import summary_text

        return summary_text(self.summary)

    def to_frame(self) -> pd.DataFrame:
        """The rows of the Parquet file."""
        import pandas as pd

        return pd.read_parquet(self.summary.out)

    def plot(self, x: str, y: str = "effective_tokens_per_s", *, by: str | None = "policy") -> Figure:
        """A column over another one, a line per value of a third.

        Raises:
            KeyError: There is no such column.
        """
        import matplotlib.pyplot as plt

        frame = self.to_frame()
        figure, axes = plt.subplots(layout="constrained")
        plt.close(figure)  # shown by whoever asks for it, and not a second time
        groups = [("", frame)] if by is None else [(str(value), rows) for value, rows in frame.groupby(by)]
        for label, rows in groups:
            ordered = rows.sort_values(x)
            axes.plot(ordered[x], ordered[y], marker="o", label=label)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if by is not None:
            axes.legend(title=by, frameon=False)
        return figure


@dataclass(frozen=True)
class Profiled(Shown):
    """What operators cost. As a frame: one row per measurement."""

    model: ModelSpec
    profile: Profile

    @cached_property
    def text(self) -> str:
        """How much was measured, and under which name."""
        kinds: dict[str, int] = {}
        for each in self.profile.measurements:
            kinds[each.op.kind] = kinds.get(each.op.kind, 0) + 1
        rows = [[kind, str(count)] for kind, count in sorted(kinds.items())]
        return f"{self.profile.profile_id}\n\n{format_table(['operator kind', 'measurements'], rows)}"

    def to_frame(self) -> pd.DataFrame:
        """One row per measured operator."""
        import pandas as pd

        return pd.DataFrame(
            {"kind": each.op.kind, "dimensions": each.op.dims, "phase": each.phase, "median_s": each.median_s}
            for each in self.profile.measurements
        )

    def plot(self) -> Figure:
        """Seconds of the operators of each kind, over the product of their dimensions."""
        import matplotlib.pyplot as plt
        import numpy as np

        frame = self.to_frame()
        frame["amount"] = [float(np.prod(dimensions)) for dimensions in frame["dimensions"]]
        figure, axes = plt.subplots(layout="constrained", figsize=(8, 5))
        plt.close(figure)
        for kind, rows in frame.groupby("kind"):
            axes.loglog(rows["amount"], rows["median_s"], ".", markersize=4, label=kind)
        axes.set_xlabel("product of the operator's dimensions")
        axes.set_ylabel("median, s")
        axes.legend(frameon=False, fontsize=7, ncols=2)
        return figure
