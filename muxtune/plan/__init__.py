"""The plan: its content, its check, its file, and what it predicts."""

from muxtune.plan.backbone import BACKBONE_RECORD, check_backbone, check_recorded, record_backbone
from muxtune.plan.basis import finish_plan
from muxtune.plan.check import check_plan
from muxtune.plan.extension import check_step_meetings, extend_schedule
from muxtune.plan.file import load_plan, save_plan
from muxtune.plan.launch_orders import ClockLaunches, clock_launches
from muxtune.plan.plan import SCHEMA_VERSION, Execution, HTask, Orchestration, Parallelism, Plan, Predicted
from muxtune.plan.prediction import (
    IterationTokens,
    iteration_tokens,
    predict,
    predict_plan,
    stage_times,
    theoretical_bubble_fraction,
)

__all__ = [
    "BACKBONE_RECORD",
    "SCHEMA_VERSION",
    "ClockLaunches",
    "Execution",
    "HTask",
    "IterationTokens",
    "Orchestration",
    "Parallelism",
    "Plan",
    "Predicted",
    "check_backbone",
    "check_plan",
    "check_recorded",
    "check_step_meetings",
    "clock_launches",
    "extend_schedule",
    "finish_plan",
    "iteration_tokens",
    "load_plan",
    "predict",
    "predict_plan",
    "record_backbone",
    "save_plan",
    "stage_times",
    "theoretical_bubble_fraction",
]
