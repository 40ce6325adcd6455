"""The plan: its content, its check, its file, and what it predicts."""

from muxtune.plan.backbone import BACKBONE_RECORD, check_backbone, check_recorded, record_backbone
from muxtune.plan.basis import finish_plan
from muxtune.plan.check import check_decisions, check_plan
from muxtune.plan.decisions import Decisions, Execution, HTaskDecision, OrchestrationDecision, Parallelism
from muxtune.plan.derived import Derived, MicrobatchShape
from muxtune.plan.extension import check_step_meetings, extend_schedule
from muxtune.plan.file import load_decisions, load_plan, save_plan
from muxtune.plan.launch_orders import ClockLaunches, clock_launches
from muxtune.plan.plan import SCHEMA_VERSION, HTask, Orchestration, Plan
from muxtune.plan.predicted import Predicted
from muxtune.plan.prediction import (
    IterationTokens,
    ideal_iteration_s,
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
    "Decisions",
    "Derived",
    "Execution",
    "HTask",
    "HTaskDecision",
    "IterationTokens",
    "MicrobatchShape",
    "Orchestration",
    "OrchestrationDecision",
    "Parallelism",
    "Plan",
    "Predicted",
    "check_backbone",
    "check_decisions",
    "check_plan",
    "check_recorded",
    "check_step_meetings",
    "clock_launches",
    "extend_schedule",
    "finish_plan",
    "ideal_iteration_s",
    "iteration_tokens",
    "load_decisions",
    "load_plan",
    "predict",
    "predict_plan",
    "record_backbone",
    "save_plan",
    "stage_times",
    "theoretical_bubble_fraction",
]
