"""``muxtune`` with parts of it switched off, to see what each part is worth (paper, section 5.4).

=================  =======================================================================================
off                what is left
=================  =======================================================================================
``fusion``         every task is an hTask of its own; tasks are interleaved, never batched
``orchestration``  the operators of a stage run one after another: no hTask computes while another
                   communicates
``chunking``       every sequence has a row as long as the hTask's longest declared length, as without any
                   alignment
=================  =======================================================================================

Everything else is searched as usual. ``--no-fusion`` and so on switch parts off; the policies
``muxtune-no-fusion`` and so on are the same with one part off, for comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from muxtune.planning.decisions.options import PlanOptions, Switchable
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies.base import POLICIES, Policy
from muxtune.policies.chosen import ChosenPolicy
from muxtune.support.errors import SpecError

_SWITCHED = "muxtune"
"""The policy that has switches."""

_PARTS: tuple[Switchable, ...] = get_args(Switchable)

_SUMMARIES: dict[Switchable, str] = {
    "fusion": "muxtune, but every task is an hTask of its own",
    "orchestration": "muxtune, but the operators of a stage run one after another",
    "chunking": "muxtune, but every sequence is padded to the longest declared length of its hTask",
}


def decided(options: PlanOptions, task_ids: Iterable[str]) -> PlanOptions:
    """The options with what is switched off fixed, as a user could have fixed it.

    Args:
        options: Options, with what is switched off in ``without``.
        task_ids: Ids of all tasks.

    Raises:
        SpecError: A part is switched off and decided by hand at once.
    """
    if "fusion" in options.without:
        if options.partition is not None:
            raise SpecError("--partition", options.partition, "nothing beside --no-fusion")
        options = replace(options, partition=",".join(task_ids))
    if "chunking" in options.without:
        if options.alignment not in {None, "pad"} or options.chunk_tokens is not None:
            asked = options.alignment or f"--chunk-tokens {options.chunk_tokens}"
            raise SpecError("--alignment", asked, "nothing beside --no-chunking, which pads")
        options = replace(options, alignment="pad")
    if "orchestration" in options.without and options.orchestration not in {None, "sequential"}:
        raise SpecError("--orchestration", options.orchestration, "nothing beside --no-orchestration")
    return options


def label(policy: str, options: PlanOptions) -> str:
    """Name of a policy in its plan, with what is switched off: ``muxtune-no-fusion``."""
    return policy + "".join(f"-no-{part}" for part in _PARTS if part in options.without)


def refuse_switches(chosen: ChosenPolicy, options: PlanOptions) -> None:
    """Refuse switches for a policy that has none.

    Whether a policy of another package follows ``orchestration``, what it proposes tells.

    Raises:
        SpecError: Names the first switch.
    """
    name = chosen.name
    if options.orchestration is not None and chosen.ours and not _follows_orchestration(chosen.policy):
        expected = f"policy {_SWITCHED}; {name} has an order of its own"
        raise SpecError("--orchestration", options.orchestration, expected)
    for part in _PARTS:
        if part in options.without and name != _SWITCHED:
            raise SpecError(f"--no-{part}", True, f"policy {_SWITCHED}; {name} has no such switch")


def _follows_orchestration(policy: Policy) -> bool:
    names = (_SWITCHED, "muxtune-one-method-per-htask", "spatial-only", "temporal-only")
    followers = {type(POLICIES.get(name)) for name in names}
    return isinstance(policy, Switched) or type(policy) in followers


class Switched:
    """``muxtune`` with one part off.

    Args:
        part: Part that is off.
    """

    def __init__(self, part: Switchable) -> None:
        self.part = part
        self.summary = _SUMMARIES[part]

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """What ``muxtune`` proposes without that part."""
        without = (*options.without, self.part)
        return POLICIES.get(_SWITCHED).propose(problem, replace(options, without=without))


for _part in _PARTS:
    POLICIES.add(f"{_SWITCHED}-no-{_part}", Switched(_part))
