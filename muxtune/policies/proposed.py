"""What a policy of another package proposes, checked before anything of it is priced."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import cast, get_args

from muxtune.batches import HTaskShape
from muxtune.orchestration import Mode
from muxtune.plan import Orchestration
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.problem.memory_limit import fitting
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies.chosen import ChosenPolicy, ProposalError
from muxtune.schedule import Template, check_own_order
from muxtune.support.errors import SpecError
from muxtune.support.printable import short_repr

MOST_STRUCTURES = 100_000
"""Structures that a policy may propose, at most."""


def proposed_structures(
    chosen: ChosenPolicy, problem: PlanningProblem, options: PlanOptions
) -> list[PlanStructure]:
    """Structures that a policy proposes for a problem.

    Our own are trusted. What another one proposes is checked; what exceeds the memory, or has another
    orchestration than was asked for, is left out.

    Raises:
        PluginError: The policy of another package does not work, or proposes what cannot be.
        UserError: The options contradict the policy, or nothing fits the memory.
    """
    if chosen.ours:
        return chosen.policy.propose(problem, options)
    with chosen.blamed():
        found: object = chosen.policy.propose(problem, options)
        if not isinstance(found, Iterable):
            raise ProposalError(f"propose returned {short_repr(found)}: expected a list of PlanStructure")
        structures = list(islice(found, MOST_STRUCTURES + 1))
        if not structures:
            raise ProposalError("propose returned no structure: expected a list of PlanStructure")
        if len(structures) > MOST_STRUCTURES:
            raise ProposalError(f"propose returned more than {MOST_STRUCTURES:,} structures")
        for position, structure in enumerate(structures):
            try:
                _check(problem, structure)
            except SpecError as error:
                raise ProposalError(f"propose returned what cannot be: [{position}]{error}") from error
        checked = cast("list[PlanStructure]", structures)
        return fitting(problem, _in_mode(chosen, checked, options.orchestration))


def _in_mode(chosen: ChosenPolicy, structures: list[PlanStructure], mode: Mode | None) -> list[PlanStructure]:
    """The structures with the orchestration that is asked for.

    Raises:
        SpecError: There is none; the policy does not follow the option.
    """
    if mode is None:
        return structures
    found = [structure for structure in structures if structure.orchestration.mode == mode]
    if not found:
        modes = ", ".join(sorted({structure.orchestration.mode for structure in structures}))
        raise SpecError("--orchestration", mode, f"{modes}, which is what {chosen.name} proposes")
    return found


def _check(problem: PlanningProblem, structure: object) -> None:
    """Refuse a structure that cannot be priced; field names in messages begin with a dot.

    Raises:
        SpecError: Names the field, the value and what was expected.
    """
    if not isinstance(structure, PlanStructure):
        raise SpecError("", structure, "a PlanStructure")
    _check_mesh(problem, structure.mesh)
    if structure.template not in get_args(Template):
        raise SpecError(".template", structure.template, f"one of {', '.join(get_args(Template))}")
    if not isinstance(structure.orchestration, Orchestration):
        raise SpecError(".orchestration", structure.orchestration, "an Orchestration")
    for position, htask in enumerate(structure.htasks):
        field = f".htasks[{position}]"
        if not isinstance(htask, HTaskChoice) or not isinstance(htask.shape, HTaskShape):
            raise SpecError(field, htask, "an HTaskChoice with an HTaskShape")
        if not htask.task_ids or not set(htask.task_ids) <= problem.data.keys():
            raise SpecError(f"{field}.task_ids", htask.task_ids, f"some of {', '.join(problem.data)}")
        _check_shape(problem, htask, structure.mesh, f"{field}.shape")
    listed = [task_id for htask in structure.htasks for task_id in htask.task_ids]
    if sorted(listed) != sorted(problem.data):
        raise SpecError(".htasks.task_ids", listed, "every task in exactly one hTask")
    positions = sorted(htask for bucket in structure.buckets for htask in bucket)
    if positions != list(range(len(structure.htasks))) or not all(structure.buckets):
        expected = f"every hTask from 0 to {len(structure.htasks) - 1} once"
        raise SpecError(".buckets", structure.buckets, expected)
    try:
        check_own_order(
            structure.microbatches,
            pp=structure.pp,
            injection=structure.injection,
            in_flight=structure.in_flight,
            carries=structure.carries,
            co_scheduled=structure.orchestration.shares_clocks,
        )
    except SpecError as error:
        field, value, expected = error.args
        raise SpecError(f".{field}", value, expected) from error


def _check_mesh(problem: PlanningProblem, mesh: object) -> None:
    if not isinstance(mesh, Mesh):
        raise SpecError(".mesh", mesh, "a Mesh")
    layers = mesh.layers_per_stage
    if not layers or min(layers) < 1 or sum(layers) != problem.model.layers:
        expected = f"integers above 0 with sum {problem.model.layers}, the layers of {problem.model.name}"
        raise SpecError(".mesh.layers_per_stage", layers, expected)
    for field, ranks in ((".mesh.tp", mesh.tp), (".mesh.dp", mesh.dp)):
        if ranks < 1:
            raise SpecError(field, ranks, "at least 1")
    if mesh.ranks > problem.cluster.ranks:
        expected = f"at most {problem.cluster.ranks} ranks, those of {problem.cluster.name}"
        raise SpecError(".mesh", str(mesh), expected)
    problem.model.shard(mesh.tp)  # refuses what does not divide the heads


def _check_shape(problem: PlanningProblem, htask: HTaskChoice, mesh: Mesh, field: str) -> None:
    shape = htask.shape
    if shape.replicas != mesh.dp:
        raise SpecError(f"{field}.replicas", shape.replicas, f"{mesh.dp}, as the mesh has")
    layout = htask.layout
    least = problem.shape(htask.task_ids, layout.alignment, layout.chunk_tokens, layout.carry, dp=mesh.dp)
    if shape.microbatches < least.microbatches:
        expected = f"at least {least.microbatches}, for the micro_batch_size of its tasks"
        raise SpecError(f"{field}.microbatches", shape.microbatches, expected)
    if shape.microbatches == least.microbatches and shape.tokens < least.tokens:
        expected = f"at least {least.tokens}, for the examples of its tasks"
        raise SpecError(f"{field}.tokens", shape.tokens, expected)
