"""What one point of a sweep plans: its workload, backbone, cluster, policy and options, checked.

A field is set before the fields inside it, so ``model: llama2-7b`` and ``model.layers: 16`` are 16 layers of
that backbone whichever stands first. Points share most of their parts; each is read and checked once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from experiments.sweep.fields import CombinationError, Part, assign
from experiments.sweep.specification import Assignments, SweepSpec
from experiments.workloads import random_workload
from muxtune.cluster import ClusterSpec, load_cluster
from muxtune.model import Dtype, ModelSpec, load_model_spec
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES, choose_policy
from muxtune.support.errors import SpecError, UserError, naming, spec_error_from, unknown_name
from muxtune.support.registry import PluginError
from muxtune.support.strict_models import StrictScalars
from muxtune.support.user_code import is_from_file
from muxtune.support.user_files import is_folder
from muxtune.tasks import Workload, load_workload, workload_from

T = TypeVar("T")

_OPTION_NAMES = [field.name for field in dataclass_fields(PlanOptions)]
_OPTIONS = TypeAdapter[PlanOptions](Annotated[PlanOptions, StrictScalars()])


@dataclass(frozen=True, slots=True, kw_only=True)
class PointInputs:
    """All that planning a point needs, beside costs."""

    workload: Workload
    model: ModelSpec
    cluster: ClusterSpec
    policy: str
    options: PlanOptions


class InputReader:
    """Makes inputs out of a sweep's base and a point's assignments.

    Args:
        spec: The sweep.
        where: File of the sweep; relative paths are taken from its folder, and messages begin with it.
    """

    def __init__(self, spec: SweepSpec, where: Path) -> None:
        self._spec = spec
        self._where = str(where)
        self._folder = where.resolve().parent
        self._known: dict[str, Any] = {}

    def read(self, point: Assignments) -> PointInputs:
        """Inputs of a point.

        Raises:
            CombinationError: Values are right by themselves and do not go together.
            UserError: A value is wrong wherever it stands, or a file cannot be read.
        """
        workload = self._once("workload", point, self._workload)
        backbone = {"backbone": workload.backbone, "dtype": workload.dtype}
        return PointInputs(
            workload=workload,
            model=self._once("model", point, self._model, **backbone),
            cluster=self._once("cluster", point, self._cluster),
            policy=self._once("policy", point, self._policy),
            options=self._once("options", point, self._options),
        )

    def _once(self, root: str, point: Assignments, read: Callable[..., T], **others: str | None) -> T:
        """What ``read`` makes of a root's fields, remembered by their values."""
        own = {field: point[field] for field in self._order(root, point)}
        key = json.dumps([root, own, others])
        if key not in self._known:
            with naming(self._where):
                self._known[key] = read(own, **others)
        return self._known[key]  # type: ignore[no-any-return]  # of the type that read returns

    def _order(self, root: str, point: Assignments) -> list[str]:
        parts = self._spec.fields
        own = [field for field in point if parts[field][0] == root]
        return sorted(own, key=lambda field: len(parts[field]))

    def _set(self, root: str, content: object, own: Mapping[str, object], depth: range) -> object:
        """``content`` with those fields of a root whose paths have so many parts."""
        tree: dict[str, object] = {root: content}
        for field, value in own.items():
            parts = self._parts(field)
            if len(parts) in depth:
                assign(tree, field, parts, deepcopy(value))
        return tree[root]

    def _parts(self, field: str) -> tuple[Part, ...]:
        return self._spec.fields[field]

    def _whole(self, root: str, own: Mapping[str, object]) -> object:
        return self._set(root, deepcopy(self._spec.base[root]), own, _WHOLE)

    def _workload(self, own: Mapping[str, object]) -> Workload:
        content = self._whole("workload", own)
        if isinstance(content, str):
            content = load_workload(self._folder / content).model_dump(mode="json", exclude_none=True)
        if content is None and not own:
            raise SpecError("workload", None, "a workload file, its content, or {random: SEED}")
        inside = {field: value for field, value in own.items() if not self._in_task(field)}
        content = self._set("workload", content, inside, _INSIDE)
        if not isinstance(content, dict):
            raise SpecError("workload", content, "a workload file, its content, or {random: SEED}")
        in_tasks = {field: value for field, value in own.items() if field not in inside}
        whole = cast("dict[str, object]", self._set("workload", _with_tasks(content), in_tasks, _INSIDE))
        return _checked(lambda: workload_from(whole, "workload", self._folder))

    def _in_task(self, field: str) -> bool:
        parts = self._parts(field)
        return len(parts) > 2 and parts[1] == "tasks"

    def _model(self, own: Mapping[str, object], *, backbone: str | None, dtype: Dtype | None) -> ModelSpec:
        content = self._whole("model", own) or backbone
        if content is None:
            raise SpecError("model", None, "a preset or Hugging Face directory, or the workload's backbone")
        if isinstance(content, str):
            directory = self._folder / content
            model = load_model_spec(str(directory) if is_folder(directory) else content, dtype)
            content = model.model_dump()
        elif isinstance(content, dict) and dtype is not None:
            content["dtype"] = dtype
        return _validated(ModelSpec, self._set("model", content, own, _INSIDE), "model")

    def _cluster(self, own: Mapping[str, object]) -> ClusterSpec:
        content = self._whole("cluster", own)
        if content is None:
            raise SpecError("cluster", None, "a preset, a cluster file or its content")
        if isinstance(content, str):
            is_file = content.endswith((".yaml", ".yml"))
            content = load_cluster(str(self._folder / content) if is_file else content).model_dump()
        return _validated(ClusterSpec, self._set("cluster", content, own, _INSIDE), "cluster")

    def _policy(self, own: Mapping[str, object]) -> str:
        name = self._whole("policy", own)
        if not isinstance(name, str):
            raise SpecError("policy", name, f"one of {', '.join(POLICIES.names())}")
        if is_from_file(name):
            name = str(self._folder / name)
        try:
            choose_policy(name)
        except PluginError as error:  # costs the points that ask for it
            raise CombinationError("policy", name, f"one that works; {error}") from error
        return name

    def _options(self, own: Mapping[str, object]) -> PlanOptions:
        content = self._set("options", self._whole("options", own), own, _INSIDE)
        if not isinstance(content, dict):
            raise SpecError("options", content, f"a mapping with fields of {', '.join(_OPTION_NAMES)}")
        for name in content:
            if name not in _OPTION_NAMES:
                raise UserError(f"{self._where}: {unknown_name('option', name, _OPTION_NAMES)}")
        try:
            return _OPTIONS.validate_python(content)
        except ValidationError as error:
            raise spec_error_from(error, "options") from error


_WHOLE = range(1, 2)
_INSIDE = range(2, 100)


def _with_tasks(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the tasks that ``random`` and ``count`` ask for, and without those two."""
    content = dict(content)
    seed, count = content.pop("random", None), content.pop("count", None)
    for name, value, least in (("random", seed, 0), ("count", count, 1)):
        if value is not None and (type(value) is not int or value < least):  # True is an int, too
            raise SpecError(f"workload.{name}", value, f"an integer, at least {least}")
    if seed is not None:
        if "tasks" in content:
            raise SpecError("workload.random", seed, "nothing: the workload has tasks already")
        drawn = random_workload(seed, tasks=count).model_dump(mode="json", exclude_none=True)
        return drawn | content
    tasks = content.get("tasks")
    if count is not None and isinstance(tasks, list) and tasks:
        content["tasks"] = [_copy(tasks[i % len(tasks)], i // len(tasks)) for i in range(count)]
    return content


def _copy(task: object, number: int) -> object:
    """A task of another tenant: like the given one, with its own id and seed."""
    if number == 0 or not isinstance(task, dict):
        return deepcopy(task)
    seed = task.get("seed", 0)
    changes = {"id": f"{task.get('id')}.{number}", "seed": seed + number if type(seed) is int else seed}
    return deepcopy(task) | changes


M = TypeVar("M", bound=BaseModel)


def _validated(schema: type[M], content: object, where: str) -> M:
    def validate() -> M:
        try:
            return schema.model_validate(content)
        except ValidationError as error:
            raise spec_error_from(error, where) from error

    return _checked(validate)


def _checked(validate: Callable[[], T]) -> T:
    """What ``validate`` returns; where only fields contradict each other, a :class:`CombinationError`."""
    try:
        return validate()
    except SpecError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError) and all(e["type"] == "value_error" for e in cause.errors()):
            raise CombinationError(*error.args) from error
        raise
