"""What a plan's prediction belongs to: a short digest of every field that times or memory depend on.

A plan carries them beside its numbers, in ``predicted.made_for``. Where a field was edited afterwards, the
numbers belong to another plan, and whoever reads it says which field that is and how to price it anew. A
field counts unless it is named here as free: it changes results or is a label, and no duration and no byte
depends on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from muxtune.plan.plan import Plan
from muxtune.support.errors import SpecError

_FREE = frozenset(
    {
        "schema_version",
        "decisions.policy",
        "decisions.objective",
        "decisions.model.name",
        "decisions.model.init_seed",
        "decisions.model.norm_eps",
        "decisions.model.rope_theta",
        "decisions.cluster.name",
        "decisions.cluster.device.memory_bytes",  # decides what fits, which is checked by itself
        "decisions.cluster.device.reserved_bytes",
    }
)
_FREE_OF_TASK = frozenset(
    {
        "id",
        "peft.alpha",
        "peft.alpha_pattern",
        "peft.use_rslora",
        "peft.init",
        "peft.init_sha256",
        "learning_rate",
        "lr_schedule",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "abort_grad_norm",
    }
)
_DIGEST_CHARACTERS = 10
_NAMED_FIELDS = 4
"""Edited fields that a refusal names."""
_NAME = re.compile(r"decisions\.h?tasks\[\d{1,6}\]|[a-z0-9_.]{1,100}")
"""Shape of a field's name; a file may have any text in its place."""

_DEPTH = 4
"""Names down to ``decisions.cluster.device.kind`` are fields; what lies deeper is one value."""
_WHOLE = frozenset({"predicted.alignment"})


def finish_plan(plan: Plan) -> Plan:
    """The plan with the digests of what its prediction belongs to: the last step of whoever makes a plan."""
    return plan.with_predicted(plan.predicted.model_copy(update={"made_for": prediction_basis(plan)}))


def prediction_basis(plan: Plan) -> dict[str, str]:
    """Digests by field.

    Of decided tasks and hTasks there is one digest per entry (``decisions.tasks[1]``) and one per field of
    all entries (``decisions.tasks.steps``), which together tell the place of an edit.
    """
    return {name: _digest(value) for name, value in _fields(plan).items()}


def check_decisions_unchanged(plan: Plan, where: str = "plan") -> None:
    """Refuse a plan whose decisions are not those that the rest of it was made from.

    Raises:
        SpecError: Names the fields, or says that the plan does not tell.
    """
    known = plan.predicted.made_for
    if not known:
        expected = f"digests of what the prediction was computed from; {_remedy(where)}"
        raise SpecError(f"{where}: predicted.made_for", known, expected)
    for name in known:
        if not _NAME.fullmatch(name):
            raise SpecError(f"{where}: predicted.made_for", name, "names of the plan's fields")
    differing = [name for name in _differing(plan) if name.startswith("decisions.")]
    if _named(plan, differing):
        _refuse(plan, differing, where)


def check_prediction_basis(plan: Plan, where: str = "plan") -> None:
    """Refuse a plan whose times and memory were computed for other fields than it has.

    Raises:
        SpecError: Names the fields, or says that the plan does not tell.
    """
    check_decisions_unchanged(plan, where)
    differing = _differing(plan)
    if differing:
        _refuse(plan, differing, where)


def _differing(plan: Plan) -> list[str]:
    known, now = plan.predicted.made_for, prediction_basis(plan)
    return [name for name in now | known if now.get(name) != known.get(name)]


def _refuse(plan: Plan, differing: Sequence[str], where: str) -> None:
    named = _named(plan, differing)
    if not named:  # an edit of a field changes two digests, that of its entry and that of its column
        known = plan.predicted.made_for
        edited = {name: known[name] for name in differing if name in known}
        expected = f"the digests that muxtune plan has written; {_remedy(where)}"
        raise SpecError(f"{where}: predicted.made_for", edited, expected)
    first = named[0]
    others = ""
    if len(named) > 1:
        listed = ", ".join(named[1:_NAMED_FIELDS])
        more = len(named) - _NAMED_FIELDS
        others = f" (nor are {listed}{f' and {more} more' if more > 0 else ''} as they were)"
    expected = f"what the plan's times and memory were predicted for{others}; {_remedy(where)}"
    raise SpecError(f"{where}: {first}", _value(plan, first), expected)


def _remedy(where: str) -> str:
    name = "PLAN" if where == "plan" else where
    return f"muxtune plan --reprice {name} predicts them anew"


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


def _fields(plan: Plan) -> dict[str, object]:
    """Values by field, as JSON has them."""
    content = plan.model_dump(mode="json")
    del content["decisions"]["policy_options"]  # they say who decided, not what
    tasks, htasks = content["decisions"].pop("tasks"), content["decisions"].pop("htasks")
    del content["predicted"]["made_for"]
    positions = {task["id"]: position for position, task in enumerate(tasks)}
    for htask in htasks:
        htask["task_ids"] = [positions.get(task_id, task_id) for task_id in htask["task_ids"]]
    counting_tasks = [_counting(task) for task in tasks]
    return {
        **{name: value for name, value in _leaves(content, depth=_DEPTH) if name not in _FREE},
        **_table("decisions.tasks", counting_tasks),
        **_table("decisions.htasks", [dict(_leaves(htask, depth=1)) for htask in htasks]),
    }


def _counting(task: dict[str, Any]) -> dict[str, object]:
    fields = {name: value for name, value in _leaves(task, depth=2) if name not in _FREE_OF_TASK}
    if fields["dataset.lengths"] is None and not fields["shuffle"]:
        del fields["seed"]  # draws no lengths and no order, only the first values of the adapters
    return fields


def _leaves(content: Mapping[str, Any], *, depth: int, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values; what lies deeper than ``depth`` is one value."""
    for key, value in content.items():
        nested = isinstance(value, dict) and depth > 1 and f"{prefix}{key}" not in _WHOLE
        if nested:
            yield from _leaves(value, depth=depth - 1, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(name: str, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    columns = dict.fromkeys(column for row in rows for column in row)
    return {
        **{f"{name}[{position}]": row for position, row in enumerate(rows)},
        **{f"{name}.{column}": [row.get(column) for row in rows] for column in columns},
    }


_TABLES = ("decisions.tasks", "decisions.htasks")


def _named(plan: Plan, differing: Sequence[str]) -> list[str]:
    """Names of the edited fields, the entry and the field of it where both can be told."""
    named = [name for name in differing if not name.startswith(_TABLES)]
    tables = []
    for table in _TABLES:
        rows = [name for name in differing if name.startswith(f"{table}[")]
        columns = [name.removeprefix(table) for name in differing if name.startswith(f"{table}.")]
        shown = [_entry(plan, row) for row in rows]
        if len(rows) == 1 or len(columns) == 1:
            tables += [f"{row}{column}" for row in shown for column in columns]
        else:
            tables += shown
    decided = [name for name in named if name.startswith("decisions.")]
    return decided + tables + [name for name in named if name not in decided]


def _entry(plan: Plan, row: str) -> str:
    """``decisions.tasks.b`` for ``decisions.tasks[1]``, as messages name tasks; hTasks have no names."""
    position = int(row.partition("[")[2].removesuffix("]"))
    tasks = plan.decisions.tasks
    is_task = row.startswith("decisions.tasks") and position < len(tasks)
    return f"decisions.tasks.{tasks[position].id}" if is_task else row


def _value(plan: Plan, name: str) -> object:
    """What stands in a field now; None where the plan has no such field any more."""
    content = plan.model_dump(mode="json")
    decided = content["decisions"]
    decided |= {f"htasks[{position}]": htask for position, htask in enumerate(decided["htasks"])}
    if name.startswith("decisions.tasks."):
        # An id may have dots.
        task = next(
            task for task in plan.decisions.tasks if f"{name}.".startswith(f"decisions.tasks.{task.id}.")
        )
        value: object = task.model_dump(mode="json")
        rest = name.removeprefix(f"decisions.tasks.{task.id}").removeprefix(".")
    else:
        value, rest = content, name
    for part in filter(None, rest.split(".")):
        value = value.get(part) if isinstance(value, dict) else None
    return value
