"""The checkpoints of one task: the format of their files, and whether they are what was written.

    tasks/<id>/checkpoints/step-000010/part-0-of-2.safetensors

Each rank that holds some of the task writes a part: its adapter (``adapter/key``) and the optimizer's moments
(``exp_avg/key``, ``exp_avg_sq/key``). The metadata says what of the whole tensors they are, so that ranks of
any mesh can take up the task, and has a digest of all the rest. A checkpoint exists once all its parts do.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from muxtune.plan import Plan
from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_atomically
from muxtune.tasks import PeftTask
from runtime.distributed.sharding import Entries, Part, Portion, assemble, file_key
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant, TenantSnapshot

T = TypeVar("T")

FORMAT_VERSION = 2
_METADATA_KEY = "muxtune.checkpoint"
_ADAPTER, _POSITIONS, _STEP = "adapter", "positions", "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DamagedCheckpointError(UserError):
    """A checkpoint's file is not what was written, or not of this task."""


class Cut(BaseModel):
    """What of a whole tensor a part has; see :class:`runtime.distributed.sharding.Portion`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]


class Header(BaseModel):
    """Metadata of a part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    task: str
    identity: str
    """Digest of the task and its backbone; the checkpoint is of use to no other."""
    steps_done: int
    """Optimizer steps of the task that it stands for."""
    examples_taken: int
    """Position in the data: examples that these steps have taken, in the order of the task's seed."""
    part: int
    parts: int
    cuts: dict[str, Cut]
    """What each tensor of the adapter, and its moments, is cut to."""
    optimizer_steps: dict[str, int]
    """Steps that the optimizer has taken, per tensor that has moments."""
    losses: list[tuple[int, float, int, float]]
    """Fields of each :class:`StepLoss`; empty but in the part that has the last stage."""
    sha256: str = ""
    """Digest of the tensors and of all other fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """What a task goes on from, whole."""

    steps_done: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Adapter and both moments, by the keys of the adapter's file."""
    optimizer_steps: Mapping[str, int]
    """Per tensor, or layer of one (:func:`runtime.distributed.sharding.name_part`)."""
    losses: Sequence[StepLoss]

    def part_of(self, tenant: Tenant) -> TenantSnapshot:
        """What a rank has of it, on whatever mesh.

        Raises:
            DamagedCheckpointError: A tensor is missing.
        """
        optimizer: dict[str, dict[str, Tensor]] = {_STEP: {}} if tenant.parameters else {}
        for name in tenant.parameters:
            optimizer[_STEP][name] = torch.tensor(float(self._of(self.optimizer_steps, name, name, tenant)))
        for moment in _MOMENTS if tenant.parameters else ():
            optimizer[moment] = self._cut(moment, tenant)
        return TenantSnapshot(adapter=self._cut(_ADAPTER, tenant), optimizer=optimizer)

    def _cut(self, kind: str, tenant: Tenant) -> dict[str, Tensor]:
        found = self.tensors.get(kind, {})
        return {
            name: portion.take(self._of(found, file_key(name), f"{kind} {name}", tenant)).contiguous()
            for name, portion in tenant.portions.items()
        }

    def _of(self, found: Mapping[str, T], key: str, what: str, tenant: Tenant) -> T:
        if key not in found:
            where = f"checkpoint of task {tenant.task.id}, step {self.steps_done}"
            raise DamagedCheckpointError(f"{where}: {what} is missing")
        return found[key]


def identity(plan: Plan, task: PeftTask) -> str:
    """Digest of what a task's training is: the task with its data, and the backbone; not how it is run."""
    backbone = "" if plan.backbone is None else plan.backbone.model_dump_json()
    text = "\n".join([task.model_dump_json(), plan.model.model_dump_json(), backbone])
    return hashlib.sha256(text.encode()).hexdigest()


def save_part(
    folder: Path,
    tenant: Tenant,
    snapshot: TenantSnapshot,
    *,
    identity: str,
    steps_done: int,
    part: int,
    parts: int,
    losses: Sequence[StepLoss] = (),
) -> None:
    """Write one rank's part of a checkpoint of a task.

    Args:
        folder: ``checkpoints`` of the task.
        tenant: Task, and what of its tensors the rank has.
        snapshot: Copy of the tenant.
        identity: See :func:`identity`.
        steps_done: Optimizer steps that it stands for.
        part: Number of the part, from 0.
        parts: Number of all.
        losses: Losses of these steps.
    """
    groups = {_ADAPTER: snapshot["adapter"]} | {
        kind: group for kind, group in snapshot["optimizer"].items() if kind != _STEP
    }
    groups[_POSITIONS] = {
        name: portion.picked
        for name, portion in tenant.portions.items()
        if isinstance(portion, Entries) and portion.picked is not None
    }
    tensors = {
        f"{kind}/{name}": tensor.contiguous()
        for kind, group in groups.items()
        for name, tensor in group.items()
    }
    header = Header(
        format_version=FORMAT_VERSION,
        task=tenant.task.id,
        identity=identity,
        steps_done=steps_done,
        examples_taken=steps_done * tenant.task.global_batch_size,
        part=part,
        parts=parts,
        cuts={
            name: Cut(dim=portion.dim, size=portion.size, ranges=portion.ranges)
            for name, portion in tenant.portions.items()
        },
        optimizer_steps={name: int(taken) for name, taken in snapshot["optimizer"].get(_STEP, {}).items()},
        losses=[astuple(loss) for loss in losses],
    )
    header = header.model_copy(update={"sha256": _digest(header, tensors)})
    metadata = {_METADATA_KEY: header.model_dump_json()}
    path = _path(folder, steps_done, part, parts)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_task(folder: Path, steps_done: int, identity: str) -> TaskState:
    """Put a checkpoint of a task together from its parts.

    Args:
        folder: ``checkpoints`` of the task.
        steps_done: Steps that it stands for.
        identity: See :func:`identity`.

    Raises:
        DamagedCheckpointError: A part is missing, not as it was written, or of another task.
    """
    parts = [_read(path, steps_done, identity) for path in _parts(folder, steps_done)]
    if not parts:
        raise DamagedCheckpointError(f"{folder / _name(steps_done)}: parts are missing")
    taken: dict[str, int] = {}
    losses: list[StepLoss] = []
    for header, _ in parts:
        taken |= header.optimizer_steps
        losses = losses or [StepLoss(*fields) for fields in header.losses]  # shards of a stage have the same
    kinds = (_ADAPTER, *_MOMENTS)
    return TaskState(
        steps_done=steps_done,
        tensors={kind: assemble(_held(header, tensors, kind) for header, tensors in parts) for kind in kinds},
        optimizer_steps=taken,
        losses=losses,
    )


def check_task(folder: Path, steps_done: int, identity: str) -> None:
    """Refuse a checkpoint of a task that :func:`load_task` would not load.

    Raises:
        DamagedCheckpointError: Says what is wrong with which file.
    """
    for path in _parts(folder, steps_done):
        _read(path, steps_done, identity)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints of a task that have all their parts, ascending."""
    return sorted(step for step, _ in checkpoint_folders(folder) if _parts(folder, step))


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints of a task, whole or not."""
    found = ((re.fullmatch(r"step-(\d+)", name), folder / name) for name in _names(folder))
    return [(int(match[1]), path) for match, path in found if match]


def _read(path: Path, steps_done: int, identity: str) -> tuple[Header, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        header = Header.model_validate_json(metadata.get(_METADATA_KEY, ""))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: missing") from error
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise DamagedCheckpointError(str(spec_error_from(error, str(path)))) from error
    _check(path, "format version", header.format_version, FORMAT_VERSION)
    if header.sha256 != _digest(header, tensors):
        raise DamagedCheckpointError(f"{path}: damaged, its content does not have its SHA-256")
    _check(path, "steps done", header.steps_done, steps_done)
    _check(path, "part", (header.part, header.parts), _numbers(path))
    if header.identity != identity:
        raise DamagedCheckpointError(f"{path}: of another task, backbone or data (task {header.task!r})")
    return header, tensors


def _held(header: Header, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Part]:
    held: dict[str, Part] = {}
    for name, cut in header.cuts.items():
        tensor = tensors.get(f"{kind}/{name}")
        if tensor is None:
            continue
        positions = tensors.get(f"{_POSITIONS}/{name}")
        held[name] = (
            Portion(cut.dim, cut.size, cut.ranges)
            if positions is None
            else Entries(cut.dim, cut.size, cut.ranges, picked=positions),
            tensor,
        )
    return held


def _digest(header: Header, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.model_copy(update={"sha256": ""}).model_dump_json().encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DamagedCheckpointError(f"{path}: {what} {found!r}, expected {expected!r}")


def _parts(folder: Path, steps_done: int) -> list[Path]:
    """Files of a checkpoint, if all of them are there."""
    found: dict[int, list[Path]] = {}
    for name in sorted(_names(folder / _name(steps_done))):
        path = folder / _name(steps_done) / name
        numbers = _numbers(path)
        if numbers is not None:
            found.setdefault(numbers[1], []).append(path)
    return next((paths for parts, paths in sorted(found.items()) if len(paths) == parts), [])


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # another rank may have removed it just now
        return []


def _numbers(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"part-(\d+)-of-(\d+)\.safetensors", path.name)
    return (int(match[1]), int(match[2])) if match else None


def _name(steps_done: int) -> str:
    return f"step-{steps_done:06d}"


def _path(folder: Path, steps_done: int, part: int, parts: int) -> Path:
    return folder / _name(steps_done) / f"part-{part}-of-{parts}.safetensors"
