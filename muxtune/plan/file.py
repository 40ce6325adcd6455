"""plan.json: a plan in one versioned file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, ValidationError

from muxtune.plan.check import check_decisions, check_plan
from muxtune.plan.decisions import Decisions
from muxtune.plan.plan import SCHEMA_VERSION, Plan
from muxtune.support.errors import SpecError, spec_error_from
from muxtune.support.files import write_text_atomically
from muxtune.support.strict_models import StrictModel
from muxtune.support.user_files import parse_json, read_user_bytes

MOST_MIB = 256
"""Largest plan file that is read, in MiB."""


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        UserError: Missing, truncated, of another version, inconsistent, or edited and not priced again.
    """
    content = _content(path)
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    check_plan(plan, str(path))
    return plan


def load_decisions(path: Path) -> Decisions:
    """Read and check the decisions of a plan, edited or not, whatever the rest of it says.

    Raises:
        UserError: Missing, truncated, of another version, or decisions that contradict each other.
    """
    try:
        decisions = _Decided.model_validate(_content(path)).decisions
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    check_decisions(decisions, str(path))
    return decisions


class _Decided(StrictModel):
    """A plan of which only the decisions are looked at."""

    model_config = ConfigDict(extra="ignore")

    decisions: Decisions


def _content(path: Path) -> object:
    content = parse_json(read_user_bytes(path, "the plan", most_mib=MOST_MIB), str(path))
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:  # true equals 1
        expected = f"{SCHEMA_VERSION}, the version that this muxtune reads; plan again (muxtune plan)"
        raise SpecError(f"{path}: schema_version", version, expected)
    return content


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan; the file is whole or absent."""
    write_text_atomically(path, plan.model_dump_json(indent=1) + "\n")
