"""Whether a plan's backbone is still the one that it was made for, and the one that a run began with."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from muxtune.model import BackboneDigest, backbone_digest, spec_from_hf, weight_files
from muxtune.plan.plan import Plan
from muxtune.support.errors import SpecError, UserError, spec_error_from
from muxtune.support.files import write_text_atomically

BACKBONE_RECORD = "backbone.json"
"""File of the backbone's digests in the folder of a run."""


def check_backbone(plan: Plan, where: str, *, digests: bool = True) -> None:
    """Refuse a directory that moved or changed since the plan was made, or has no weights; presets cannot.

    Args:
        plan: Plan that has been checked.
        where: The file or object in front of the field's name.
        digests: Compare contents, too; one rank of a machine is enough.

    Raises:
        SpecError: Says what changed.
    """
    model, field = plan.model, f"{where}: decisions.model.source"
    if model.source == "preset":
        return
    if not weight_files(Path(model.source)):
        raise SpecError(field, model.source, "a directory with weights (model.safetensors)")
    if spec_from_hf(Path(model.source), model.dtype) != model:
        raise SpecError(field, model.source, "the backbone that the plan was made for (plan again)")
    if digests:
        _check(plan.backbone, plan, field, "the plan was made for (plan again)")


def record_backbone(plan: Plan, run_dir: Path) -> None:
    """Note in a new run's folder what it begins with; a plan may have been made before there were weights."""
    digest = backbone_digest(plan.model)
    if digest is not None:
        write_text_atomically(run_dir / BACKBONE_RECORD, digest.model_dump_json(indent=1) + "\n")


def check_recorded(plan: Plan, run_dir: Path) -> None:
    """Refuse a backbone that changed since a run began.

    Raises:
        UserError: Says what changed, or that the record cannot be read.
    """
    path = run_dir / BACKBONE_RECORD
    if not path.is_file():  # a preset, or a run of an older version
        return
    try:
        recorded = BackboneDigest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the record {path}: {error.strerror}") from error
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    _check(recorded, plan, f"{run_dir}: decisions.model.source", "the run began with")


def _check(before: BackboneDigest | None, plan: Plan, field: str, what: str) -> None:
    now = backbone_digest(plan.model)
    if before is None or now is None:
        return
    changed = before.first_change(now)
    if changed is not None:
        raise SpecError(field, plan.model.source, f"the {changed} that {what}")
