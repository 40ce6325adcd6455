"""Whether the parts of a plan agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from muxtune.graph.operators import Phase
from muxtune.model import check_sharding
from muxtune.orchestration import check_order
from muxtune.plan.basis import check_decisions_unchanged, check_prediction_basis
from muxtune.plan.decisions import Decisions, HTaskDecision
from muxtune.plan.extension import check_step_meetings
from muxtune.plan.plan import Plan
from muxtune.schedule import Kind, Template, check_own_order, check_schedule, clocks_of
from muxtune.support.errors import SpecError, naming
from muxtune.support.tables import Quantity, show_bytes_down, show_bytes_up

PART = "decisions."
"""Where decisions stand in a plan."""

_PHASES: dict[Kind, Phase] = {"F": "fwd", "B": "bwd"}


def check_plan(plan: Plan, where: str = "plan") -> None:
    """Refuse a plan whose parts contradict each other, whoever reads it: simulator, runtime or validation.

    Decisions that contradict themselves have a message of their own. Decisions that were edited after the
    rest was made from them are refused before anything that follows from them is looked at.

    Raises:
        SpecError: Names the field, its value and what was expected.
    """
    check_decisions(plan.decisions, where)
    check_decisions_unchanged(plan, where)
    _check_derived(plan, where)
    _check_predicted(plan, where)
    _check_launches(plan, where)
    _check_memory(plan, where)
    check_prediction_basis(plan, where)  # last: what is wrong in itself has a message of its own


def check_decisions(decisions: Decisions, where: str, part: str = PART) -> None:
    """Refuse decisions that contradict each other.

    Args:
        decisions: Decisions of a plan.
        where: The file or object in front of a field's name.
        part: What else stands in front of it; nothing in a file of decisions alone.

    Raises:
        SpecError: Names the field, its value and what was expected.
    """
    p, cluster, model = decisions.parallelism, decisions.cluster, decisions.model
    prefix = f"{where}: {part}"
    field = f"{prefix}parallelism"
    if len(p.layers_per_stage) != p.pp or sum(p.layers_per_stage) != model.layers:
        expected = f"{p.pp} integers with sum {model.layers}, the layers of {model.name}"
        raise SpecError(f"{field}.layers_per_stage", list(p.layers_per_stage), expected)
    if min(p.layers_per_stage) < 1:
        raise SpecError(f"{field}.layers_per_stage", list(p.layers_per_stage), "at least 1 per stage")
    with naming_part(prefix):
        check_sharding(model, p.tp)
    if p.ranks > cluster.ranks:
        expected = f"at most {cluster.ranks}, the ranks of {cluster.name}"
        raise SpecError(f"{field} (tp * pp * dp)", p.ranks, expected)
    if any(route.nodes > 1 for stage in range(p.pp) for route in decisions.placement.shard_routes(stage)):
        per_node = cluster.devices_per_node
        expected = f"ranks of one node: a divisor of the {per_node} that a node of {cluster.name} has"
        raise SpecError(f"{field}.tp", p.tp, expected)
    with naming_part(prefix):
        for task in decisions.tasks:
            task.check(model)
    ids = [task.id for task in decisions.tasks]
    if len(set(ids)) != len(ids):
        raise SpecError(f"{prefix}tasks", ids, "unique ids")
    _check_htasks(decisions, prefix)
    listed = sorted(h for bucket in decisions.buckets for h in bucket)
    if listed != list(range(len(decisions.htasks))) or not all(decisions.buckets):
        expected = f"every hTask from 0 to {len(decisions.htasks) - 1} once"
        raise SpecError(f"{prefix}buckets", [list(b) for b in decisions.buckets], expected)
    if decisions.orchestration.shares_clocks:
        _check_shared_clocks(decisions, prefix)


@contextmanager
def naming_part(prefix: str) -> Iterator[None]:
    """Put the file's name and the plan's part in front of the field of a ``SpecError`` raised inside."""
    try:
        yield
    except SpecError as error:
        field, *others = error.args
        error.args = (f"{prefix}{field}", *others)
        raise


def _check_derived(plan: Plan, where: str) -> None:
    if plan.decisions.costs is None:
        raise SpecError(f"{where}: decisions.costs", None, "the costs that the plan is priced with")
    for name, per, given, wanted in (
        ("dataset_sha256", "task", len(plan.derived.dataset_sha256), len(plan.decisions.tasks)),
        (
            "init_sha256",
            "task",
            len(plan.derived.init_sha256) or len(plan.decisions.tasks),
            len(plan.decisions.tasks),
        ),
        ("htasks", "hTask", len(plan.derived.htasks), len(plan.decisions.htasks)),
        ("schedule", "stage", len(plan.schedule), plan.parallelism.pp),
    ):
        if given != wanted:
            raise SpecError(f"{where}: derived.{name}", f"{given} entries", f"one per {per} ({wanted})")
    for position, htask in enumerate(plan.htasks):
        _check_shape(plan, position, f"{where}: derived.htasks[{position}]")
        decided = plan.decisions.htasks[position].microbatches
        if decided not in {None, htask.microbatches}:
            field = f"{where}: derived.htasks[{position}].microbatches"
            raise SpecError(field, htask.microbatches, f"{decided}, which is decided")
    with naming_part(f"{where}: {PART}"):
        check_own_order(
            plan.microbatches,
            pp=plan.parallelism.pp,
            injection=plan.injection,
            in_flight=plan.in_flight,
            carries=plan.carries,
            co_scheduled=plan.orchestration.shares_clocks,
        )
    with naming_part(f"{where}: derived."):
        check_schedule(
            plan.actions,
            plan.microbatches,
            buckets=plan.shared_buckets,
            in_flight_limit=plan.template != "gpipe",
            carries=plan.carries,
            in_flight=plan.in_flight,
        )
    missing = set(range(len(plan.htasks))) - {action.htask for action in plan.actions[0]}
    if missing:
        expected = "at least one step of every hTask"
        raise SpecError(f"{where}: derived.schedule", f"no action of hTask {min(missing)}", expected)
    clipping = [h.id for h in plan.htasks if any(t.max_grad_norm is not None for t in plan.htask_tasks(h.id))]
    check_step_meetings(plan.actions, clipping, where)


def _check_shape(plan: Plan, position: int, field: str) -> None:
    htask = plan.htasks[position]
    if htask.chunk_tokens is not None and htask.tokens_per_microbatch % htask.chunk_tokens:
        expected = f"a multiple of chunk_tokens ({htask.chunk_tokens})"
        raise SpecError(f"{field}.tokens_per_microbatch", htask.tokens_per_microbatch, expected)
    for task in plan.htask_tasks(position):
        needed = -(-task.declared_microbatches // plan.parallelism.dp)
        if htask.microbatches < needed:
            expected = f"at least {needed}: {task.id} allows no more sequences per micro-batch"
            raise SpecError(f"{field}.microbatches", htask.microbatches, expected)
    if htask.microbatches % htask.carry_microbatches:
        expected = f"a multiple of carry_microbatches ({htask.carry_microbatches})"
        raise SpecError(f"{field}.microbatches", htask.microbatches, expected)


def _check_memory(plan: Plan, where: str) -> None:
    most, device = max(plan.predicted.peak_memory_bytes), plan.cluster.device
    if most > device.memory_bytes:
        expected = f"at most {show_bytes_down(device.memory_bytes)}, the memory of {device.name}"
        raise SpecError(f"{where}: predicted.peak_memory_bytes", Quantity(show_bytes_up(most)), expected)


def _check_launches(plan: Plan, where: str) -> None:
    """What stands there is the order of every clock that overlaps, on every stage."""
    launches = plan.orchestration.launches
    if not launches:
        return
    field = f"{where}: derived.launches"
    listed = [(clock.kind, clock.htasks) for clock in launches]
    if not plan.overlaps:
        expected = f"nothing: no clock overlaps (tp {plan.parallelism.tp}, {plan.orchestration.mode})"
        raise SpecError(field, _named(listed), expected)
    if sorted(listed) != sorted(plan.clock_kinds):
        expected = f"nothing, or {', '.join(_named(plan.clock_kinds))}, once each"
        raise SpecError(field, _named(listed), expected)
    for position, clock in enumerate(launches):
        of_clock = f"{field}[{position}].orders"
        stages = [stage for each in clock.orders for stage in each.stages]
        if sorted(stages) != list(range(plan.parallelism.pp)):
            expected = f"every stage from 0 to {plan.parallelism.pp - 1} once"
            raise SpecError(f"{of_clock}.stages", stages, expected)
        for number, each in enumerate(clock.orders):
            for stage in each.stages:
                cuts = [plan.action_cut(stage, _PHASES[clock.kind], h) for h in clock.htasks]
                with naming(f"{of_clock}[{number}]"):
                    check_order(cuts, each.order)


def _named(kinds: Iterable[tuple[Kind, tuple[int, ...]]]) -> list[str]:
    return [f"{kind} of {list(htasks)}" for kind, htasks in kinds]


def _check_htasks(decisions: Decisions, prefix: str) -> None:
    tasks = {task.id: task for task in decisions.tasks}
    assigned: list[str] = []
    for position, htask in enumerate(decisions.htasks):
        field = f"{prefix}htasks[{position}]"
        for task_id in htask.task_ids:
            if task_id not in tasks:
                raise SpecError(f"{field}.task_ids", task_id, f"one of {', '.join(sorted(tasks))}")
        assigned += htask.task_ids
        if (htask.alignment == "chunk") != (htask.chunk_tokens is not None):
            expected = "a chunk length under chunk, and null otherwise"
            raise SpecError(f"{field}.chunk_tokens", htask.chunk_tokens, expected)
        _check_carry(htask, decisions.template, field)
        for task_id in htask.task_ids if htask.microbatches is not None else ():
            needed = -(-tasks[task_id].declared_microbatches // decisions.parallelism.dp)
            if htask.microbatches is not None and htask.microbatches < needed:
                expected = f"null, or at least {needed}: {task_id} allows no more sequences per micro-batch"
                raise SpecError(f"{field}.microbatches", htask.microbatches, expected)
    if sorted(assigned) != sorted(tasks):
        raise SpecError(f"{prefix}htasks.task_ids", assigned, "every task in exactly one hTask")


def _check_carry(htask: HTaskDecision, template: Template, field: str) -> None:
    carry = htask.carry_microbatches
    if carry == 1:
        return
    if template == "lorapp":
        expected = "1: under lorapp an hTask has one micro-batch on its way"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)
    if htask.alignment != "chunk":
        expected = f"1: only chunks are carried on, and the alignment is {htask.alignment}"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)
    if carry & (carry - 1):
        raise SpecError(f"{field}.carry_microbatches", carry, "a power of two")
    if htask.microbatches is not None and htask.microbatches % carry:
        expected = f"a power of two that divides microbatches ({htask.microbatches})"
        raise SpecError(f"{field}.carry_microbatches", carry, expected)


def _check_shared_clocks(decisions: Decisions, prefix: str) -> None:
    for bucket in decisions.buckets:
        instances = sorted({decisions.htasks[h].instance for h in bucket})
        if len(instances) > 1:
            expected = f"one, as hTasks {list(bucket)} share clocks ({decisions.orchestration.mode})"
            raise SpecError(f"{prefix}htasks.instance", instances, expected)


def _check_clock_seconds(plan: Plan, where: str) -> None:
    field = f"{where}: predicted.clock_s"
    listed = [(clock.kind, clock.htasks) for clock in plan.predicted.clock_s]
    played = {
        (clock[0].kind, tuple(action.htask for action in clock))
        for clock in clocks_of(plan.actions[0], plan.microbatches, plan.shared_buckets)
        if len(clock) > 1
    }
    if len(listed) != len(played) or set(listed) != played:
        names = [f"{kind} of {list(htasks)}" for kind, htasks in sorted(played)]
        expected = ", ".join(names) if names else f"nothing: no clocks are shared ({plan.orchestration.mode})"
        raise SpecError(field, [f"{kind} of {list(htasks)}" for kind, htasks in listed], expected)
    for position, clock in enumerate(plan.predicted.clock_s):
        if len(clock.seconds) != plan.parallelism.pp:
            expected = f"{plan.parallelism.pp} numbers, one per stage"
            raise SpecError(f"{field}[{position}].seconds", len(clock.seconds), expected)


def _check_predicted(plan: Plan, where: str) -> None:
    p, stages, htasks = plan.predicted, plan.parallelism.pp, len(plan.htasks)
    tables = {"fwd_s": p.fwd_s, "bwd_s": p.bwd_s}
    for name, table in tables.items():
        if len(table) != stages or any(len(row) != htasks for row in table):
            expected = f"{stages} rows (stages) of {htasks} numbers (hTasks)"
            raise SpecError(f"{where}: predicted.{name}", [len(row) for row in table], expected)
    shown = 1 + max((a.number for a in plan.actions[0] if a.kind == "STEP"), default=-1)
    if p.scheduled_iterations != shown:
        expected = f"{shown}, the iterations of the schedule"
        raise SpecError(f"{where}: predicted.scheduled_iterations", p.scheduled_iterations, expected)
    if len(p.p2p_s) != htasks:
        raise SpecError(f"{where}: predicted.p2p_s", len(p.p2p_s), f"{htasks} numbers, one per hTask")
    if len(p.peak_memory_bytes) != stages:
        raise SpecError(
            f"{where}: predicted.peak_memory_bytes", len(p.peak_memory_bytes), f"{stages} numbers"
        )
    _check_clock_seconds(plan, where)
