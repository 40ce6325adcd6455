"""plan.json: a plan in one versioned file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from muxtune.plan.check import check_plan
from muxtune.plan.plan import SCHEMA_VERSION, Plan
from muxtune.support.errors import SpecError, spec_error_from
from muxtune.support.files import write_text_atomically
from muxtune.support.user_files import parse_json, read_user_bytes

MOST_MIB = 256
"""Largest plan file that is read, in MiB."""


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        UserError: Missing, truncated, of another version, or inconsistent.
    """
    content = parse_json(read_user_bytes(path, "the plan", most_mib=MOST_MIB), str(path))
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:  # true equals 1
        expected = f"{SCHEMA_VERSION}, the version that this muxtune reads"
        raise SpecError(f"{path}: schema_version", version, expected)
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    check_plan(plan, str(path))
    return plan


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan; the file is whole or absent."""
    write_text_atomically(path, plan.model_dump_json(indent=1) + "\n")
