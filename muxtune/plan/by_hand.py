"""Decisions that a person writes: a short YAML file with the fields of a plan's ``decisions``.

Workload, backbone and cluster are named instead of written out, and whatever is absent is chosen by
:func:`muxtune.planning.problem.by_hand.complete_decisions`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from muxtune.batches import Alignment
from muxtune.graph.attention_backends import AttentionName
from muxtune.plan.decisions import OrchestrationDecision
from muxtune.schedule import Template
from muxtune.support.errors import SpecError, spec_error_from
from muxtune.support.strict_models import StrictModel
from muxtune.support.user_files import expand_user
from muxtune.support.yaml_file import load_yaml


class HandParallelism(StrictModel):
    """How the backbone is spread over ranks."""

    tp: int = Field(default=1, gt=0)
    """Ranks that share a stage."""
    pp: int | None = Field(default=None, gt=0)
    """Pipeline stages; by default as many as ``layers_per_stage`` has, or as there are ranks for."""
    dp: int = Field(default=1, gt=0)
    """Replicas that share the data of every step."""
    layers_per_stage: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Layers of the backbone on each stage; by default with the least work on the busiest one."""


class HandHTask(StrictModel):
    """Tasks that run as one through the backbone."""

    task_ids: tuple[str, ...] = Field(min_length=1)
    """Ids of its tasks."""
    alignment: Alignment | None = None
    """How sequences lie in the stream; by default the way that takes the slowest stage least time."""
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Chunk length; it makes the alignment ``chunk``."""
    carry_microbatches: int = Field(default=1, gt=0)
    """Micro-batches in a row over which the chunks of a sequence may spread."""
    microbatches: int | None = Field(default=None, gt=0)
    """Micro-batches of a step on each replica; by default as few as the tasks' sizes allow."""
    instance: int = Field(default=0, ge=0)
    """Number of the copy of the backbone that runs it."""


class HandExecution(StrictModel):
    """Means of the runtime."""

    attention: AttentionName | None = None
    """Backend of attention; by default the one whose times the costs have."""


class HandDecisions(StrictModel):
    """A file of decisions only."""

    workload: Path
    """Workload file, relative to this one."""
    model: str | None = None
    """Preset or Hugging Face directory; by default the workload's backbone."""
    cluster: str = "cpu-2"
    """Name or YAML file of the cluster."""
    policy: str = "by-hand"
    """Label of the plan."""
    parallelism: HandParallelism = HandParallelism()
    """The mesh."""
    htasks: tuple[HandHTask, ...] | None = Field(default=None, min_length=1)
    """The fusion; by default every task alone, in the order of the workload."""
    buckets: tuple[tuple[int, ...], ...] | None = Field(default=None, min_length=1)
    """Positions in ``htasks`` per bucket, in order of injection; by default a bucket for each hTask, or one
    for all where hTasks share clocks."""
    template: Template = "continuous"
    """Rule by which the schedule is generated."""
    injection: tuple[int, ...] = ()
    """hTasks of an iteration's micro-batches in the order in which they enter; by default by turns."""
    in_flight: tuple[int, ...] = ()
    """Clocks that each stage may have in flight; by default what the template says."""
    orchestration: OrchestrationDecision = OrchestrationDecision()
    """How the operators of a clock overlap."""
    execution: HandExecution = HandExecution()
    """With what the runtime executes it."""


def load_hand_decisions(path: Path) -> HandDecisions:
    """Read a file of decisions; the workload's path becomes one from the current directory.

    Raises:
        UserError: The file is missing, not YAML, or a field is wrong; the message names it.
    """
    content = load_yaml(path, "the decisions")
    if not isinstance(content, dict):
        raise SpecError(str(path), content, "a mapping with the key workload")
    try:
        decisions = HandDecisions.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    workload = path.parent / expand_user(decisions.workload, f"{path}: workload")
    return decisions.model_copy(update={"workload": workload})
