"""The files of a checkpoint: their format, whether they are whole, and which checkpoint to go on from.

    checkpoints/step-000010/rank-0.safetensors    adapters, optimizer states, losses
    checkpoints/step-000010/rank-0.sha256         its checksum, written when the file above is on disk

A checkpoint exists once the checksums of all its ranks are there. ``sha256sum -c`` reads them, too. Tensors
are named ``task/adapter/key`` and ``task/exp_avg/key``; the file's metadata says what it belongs to.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from muxtune.plan import Plan
from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_atomically, write_text_atomically
from runtime.tasks.tenant import TenantSnapshot

FORMAT_VERSION = 1
_METADATA_KEY = "muxtune.checkpoint"
_ADAPTER = "adapter"


class DamagedCheckpointError(UserError):
    """A checkpoint's file is not what was written, or not of this run."""


class RankState(TypedDict):
    """Content of one rank's file."""

    tenants: dict[str, TenantSnapshot]
    losses: dict[str, list[tuple[int, float, int, float]]]
    """Fields of each :class:`StepLoss` of the steps so far; empty unless the rank has the last stage."""


class Header(BaseModel):
    """Run, step and rank that a file belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    plan: str
    """Digest of the run's plan."""
    step: int
    """Optimizer steps that the checkpoint stands for."""
    rank: int
    tasks: tuple[str, ...]
    losses: dict[str, list[tuple[int, float, int, float]]]


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that a checkpoint must be of."""

    plan: str
    ranks: int
    """Ranks whose files make a checkpoint: the first ones, which are the first replica."""
    tasks: frozenset[str]

    @classmethod
    def of(cls, plan: Plan) -> Owner:
        """The owner of a plan's checkpoints."""
        return cls(
            hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
            plan.parallelism.ranks // plan.parallelism.dp,
            frozenset(task.id for task in plan.tasks),
        )


def save_rank_state(folder: Path, state: RankState, *, plan: str, step: int, rank: int) -> None:
    """Write one rank's file of a checkpoint, and then its checksum.

    Args:
        folder: ``checkpoints`` of the run.
        state: State to write.
        plan: Digest of the run's plan.
        step: Optimizer steps that it stands for.
        rank: Rank whose state it is.
    """
    tensors: dict[str, Tensor] = {}
    for task_id, snapshot in state["tenants"].items():
        for kind, group in ((_ADAPTER, snapshot["adapter"]), *snapshot["optimizer"].items()):
            tensors |= {f"{task_id}/{kind}/{key}": tensor.contiguous() for key, tensor in group.items()}
    header = Header(
        format_version=FORMAT_VERSION,
        plan=plan,
        step=step,
        rank=rank,
        tasks=tuple(state["tenants"]),
        losses=state["losses"],
    )
    metadata = {_METADATA_KEY: header.model_dump_json()}
    path = _path(folder, step, rank)
    checksum = path.with_suffix(".sha256")
    checksum.unlink(missing_ok=True)  # of an earlier file of this name
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    write_text_atomically(checksum, f"{_sha256(path)}  {path.name}\n")


def load_rank_state(folder: Path, step: int, rank: int) -> RankState:
    """Read one rank's file.

    Raises:
        DamagedCheckpointError: It is missing, or not as it was written.
    """
    header = _checked_header(folder, step, rank)
    tenants = {task_id: TenantSnapshot(adapter={}, optimizer={}) for task_id in header.tasks}
    path = _path(folder, step, rank)
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            task_id, kind, key = name.split("/", 2)
            snapshot = tenants[task_id]
            group = snapshot["adapter"] if kind == _ADAPTER else snapshot["optimizer"].setdefault(kind, {})
            group[key] = file.get_tensor(name)
    return RankState(tenants=tenants, losses=header.losses)


def complete_checkpoints(folder: Path, ranks: int) -> list[int]:
    """Steps of the checkpoints that have the files of so many ranks, ascending."""
    return sorted(
        step
        for step, path in _checkpoints(folder)
        if all(_path(folder, step, rank).with_suffix(".sha256").is_file() for rank in range(ranks))
    )


def newest_checkpoint(folder: Path, ranks: int) -> int | None:
    """Steps that the newest checkpoint with the files of so many ranks stands for."""
    return max(complete_checkpoints(folder, ranks), default=None)


def whole_checkpoint(folder: Path, owner: Owner) -> tuple[int | None, list[str]]:
    """The newest checkpoint whose files are whole, and why newer ones are not used."""
    complaints, complete = [], complete_checkpoints(folder, owner.ranks)
    for step, path in sorted(_checkpoints(folder), reverse=True):
        if step not in complete and not any(path.glob("*.pt")):  # a run was killed while it wrote it
            continue
        try:
            for rank in range(owner.ranks):
                _check_owner(_checked_header(folder, step, rank), folder, step, rank, owner)
        except DamagedCheckpointError as error:
            complaints.append(str(error))
        else:
            return step, complaints
    return None, complaints


def remove_older(folder: Path, ranks: int, *, keep: int) -> None:
    """Remove what is older than the newest ``keep`` complete checkpoints."""
    kept = complete_checkpoints(folder, ranks)[-keep:]
    for step, path in _checkpoints(folder):
        if kept and step < kept[0]:
            shutil.rmtree(path, ignore_errors=True)  # another rank may be removing it too


def clear_newer(folder: Path, ranks: int, step: int) -> None:
    """Make room for the checkpoints after ``step``, whose files must not mix with those that lie there.

    One that was never complete goes. A complete one, which is not whole any more, is kept as ``unused-*``.
    """
    complete = complete_checkpoints(folder, ranks)
    for other, path in _checkpoints(folder):
        if other <= step:
            continue
        aside = path.with_name(f"unused-{path.name}")
        if other in complete:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        else:
            shutil.rmtree(path)


def _checked_header(folder: Path, step: int, rank: int) -> Header:
    path = _path(folder, step, rank)
    checksum = path.with_suffix(".sha256")
    old = path.with_suffix(".pt")
    try:
        if old.is_file():
            raise DamagedCheckpointError(f"{old}: of an earlier version of muxtune, which cannot be read")
        expected = checksum.read_text(encoding="utf-8", errors="replace").split()[:1]
        if expected != [_sha256(path)]:
            raise DamagedCheckpointError(f"{path}: damaged, its SHA-256 is not that in {checksum.name}")
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
        header = Header.model_validate_json(metadata.get(_METADATA_KEY, ""))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{error.filename}: missing") from error
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise DamagedCheckpointError(str(spec_error_from(error, str(path)))) from error
    _check(path, "format version", header.format_version, FORMAT_VERSION)
    _check(path, "step", header.step, step)
    _check(path, "rank", header.rank, rank)
    _check(path, "tasks", sorted({name.split("/", 1)[0] for name in names}), sorted(header.tasks))
    return header


def _check_owner(header: Header, folder: Path, step: int, rank: int, owner: Owner) -> None:
    path = _path(folder, step, rank)
    _check(path, "plan", header.plan, owner.plan)
    _check(path, "tasks", sorted(header.tasks), sorted(owner.tasks))


def _check(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DamagedCheckpointError(f"{path}: {what} {found!r}, expected {expected!r}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in found if match]


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step:06d}" / f"rank-{rank}.safetensors"
