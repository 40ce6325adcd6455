"""Policies that share one backbone but multiplex in one dimension only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.carrying import cut_variants, may_carry
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import (
    LayoutOf,
    aligned_groups,
    in_mode,
    in_order,
    pipeline_candidates,
)
from muxtune.policies.base import POLICIES
from muxtune.support.errors import SpecError


@POLICIES.register("sl-peft")
class SlPeft:
    """All tasks batched into one hTask, every sequence padded to the longest declared length (SLoRA-PEFT)."""

    summary = "shared backbone, all tasks in one batch padded to the longest, 1F1B with a flush"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure per mesh."""
        refuse_partition(options, "sl-peft")

        def build(fixed: PlanOptions) -> list[PlanStructure]:
            htasks, mesh = aligned_groups(problem, fixed.padded_by_default(), [tuple(problem.data)])
            return [in_order(htasks, mesh, fixed.template or "flush")]

        return on_every_mesh(problem, options, build)


@POLICIES.register("spatial-only")
class SpatialOnly:
    """All tasks in one hTask; alignment and template are chosen as muxtune does."""

    summary = "shared backbone, all tasks fused into one hTask"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure per mesh and template."""
        refuse_partition(options, "spatial-only")
        return fixed_partition(problem, options, [tuple(problem.data)])


@POLICIES.register("temporal-only")
class TemporalOnly:
    """Every task is an hTask of its own; grouping, alignment and template are chosen as muxtune does."""

    summary = "shared backbone, tasks interleaved but never fused"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """All meshes, groupings and templates."""
        refuse_partition(options, "temporal-only")
        return fixed_partition(problem, options, [(task_id,) for task_id in problem.data])


def refuse_partition(options: PlanOptions, policy: str) -> None:
    """Refuse a fusion that is fixed by hand, for a policy that is defined by its own.

    Raises:
        SpecError: Names the option.
    """
    if options.partition is not None:
        raise SpecError("--partition", options.partition, f"nothing: {policy} decides the fusion by itself")


def fixed_partition(
    problem: PlanningProblem,
    options: PlanOptions,
    groups: Sequence[tuple[str, ...]],
    *,
    layout_of: LayoutOf | None = None,
) -> list[PlanStructure]:
    """All meshes, groupings and templates for a given fusion, with the cheapest alignments; those that fit.

    Long micro-batches are cut, too, unless the options say how they are laid out.

    Args:
        problem: The planning problem.
        options: Decisions that are taken away from the policy.
        groups: Tasks of each hTask.
        layout_of: Chooses the layout of an hTask instead of the costs.

    Raises:
        SpecError: The partition does not fit the memory, or the layout is decided twice.
    """
    free = options.alignment is None and options.chunk_tokens is None and options.carry is None
    if layout_of is not None and not free:
        asked = options.alignment or options.chunk_tokens or options.carry
        raise SpecError(
            "--alignment, --chunk-tokens or --carry", asked, "nothing: the policy lays out hTasks"
        )

    def build(fixed: PlanOptions) -> list[PlanStructure]:
        htasks, mesh = aligned_groups(problem, fixed, groups, layout_of)
        templates = fixed.templates(problem.settings.templates)
        structures = pipeline_candidates(problem, htasks, mesh, templates)
        for variant in cut_variants(problem, htasks, mesh) if layout_of is None and may_carry(fixed) else ():
            structures += pipeline_candidates(problem, variant, mesh, templates)
        if options.objective != "iteration" and fixed.alignment is None:  # cheapest is by time
            structures += leaner(fixed)
        if fixed.orchestration is None or fixed.orchestration == "sequential":
            return structures
        latency_s = [problem.htask_times(htask, mesh).slowest_s for htask in htasks]
        return in_mode(problem, structures, latency_s, fixed.orchestration)

    def leaner(fixed: PlanOptions) -> list[PlanStructure]:
        """Structures in the alignment whose streams are shortest, if what is fastest does not fit."""
        free = fixed.alignment is None and fixed.chunk_tokens is None and (fixed.carry or 1) == 1
        return build(replace(fixed, alignment="pack")) if free and layout_of is None else []

    return on_every_mesh(problem, options, build, leaner)
