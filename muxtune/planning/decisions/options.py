"""What a user may fix before planning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from muxtune.batches import Alignment
from muxtune.orchestration import Mode
from muxtune.schedule import Template
from muxtune.support.errors import SpecError

Switchable = Literal["fusion", "orchestration", "chunking"]
"""What :mod:`muxtune.policies.switches` can switch off."""


ObjectiveName = Literal["iteration", "memory", "makespan", "slowest-tenant"]
ObjectiveOption = ObjectiveName | str | Callable[..., float]
"""An objective, or a function of a planning problem and a structure whose result is to be small; one of a
file is ``FILE.py:FUNCTION``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Decisions that are taken away from a policy; None leaves them to it."""

    partition: str | None = None
    """Fusion as ``"a+b,c"``: hTasks {a, b} and {c}."""
    alignment: Alignment | None = None
    chunk_tokens: int | None = None
    carry: int | None = None
    """Micro-batches over which sequences are cut; 1 for none."""
    template: Template | None = None
    orchestration: Mode | None = None
    """How the hTasks of a clock share a stage."""
    tp: int | None = None
    """Ranks that share a stage."""
    pp: int | None = None
    """Pipeline stages."""
    dp: int | None = None
    """Replicas that share the data."""
    meshes: tuple[tuple[int, int, int], ...] | None = None
    """The only meshes (``tp``, ``pp``, ``dp``) that are looked at, where they stand in for all possible."""
    one_method: bool = False
    """Whether the tasks of an hTask must have one PEFT method, in a fusion that is searched."""
    without: tuple[Switchable, ...] = ()
    """Parts of the policy ``muxtune`` that are switched off."""
    objective: ObjectiveOption = "iteration"
    """What plans are compared by; see :mod:`muxtune.planning.problem.objectives`."""
    policy_options: Any = None
    """Options of the policy's own by key, or the model that it declares; the policy gets the latter."""

    def templates(self, allowed: Sequence[Template]) -> Sequence[Template]:
        """The fixed template, or those that the policy would try."""
        return allowed if self.template is None else (self.template,)

    def padded_by_default(self) -> PlanOptions:
        """These options with ``pad`` where no alignment is asked for: what systems without packing do."""
        if self.alignment is not None or self.chunk_tokens is not None or (self.carry or 1) > 1:
            return self
        return replace(self, alignment="pad")


FREE = PlanOptions()
"""Nothing fixed."""


def parse_partition(text: str, task_ids: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of task ids.

    Raises:
        SpecError: An unknown task, or one that does not stand exactly once.
    """
    known = list(task_ids)
    groups = [tuple(name.strip() for name in group.split("+")) for group in text.split(",")]
    named = [name for group in groups for name in group]
    for name in named:
        if name not in known:
            raise SpecError("--partition", name, f"one of {', '.join(known)}")
        if named.count(name) > 1:
            raise SpecError("--partition", text, f"every task once; {name} stands {named.count(name)} times")
    missing = [name for name in known if name not in named]
    if missing:
        raise SpecError("--partition", text, f"every task once; {', '.join(missing)} is missing")
    return groups
