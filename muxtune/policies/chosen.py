"""A policy to plan with: by name, or an object of a caller's own, with its options checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel, ValidationError

from muxtune.policies.base import POLICIES, Policy
from muxtune.policies.from_file import policy_from_file
from muxtune.support.complaints import complaints
from muxtune.support.errors import SpecError, UserError
from muxtune.support.registry import PluginError, raised
from muxtune.support.user_code import is_from_file

FLAG = "--policy-option"


@dataclass(frozen=True, slots=True)
class ChosenPolicy:
    """A policy, with what plans and messages call it."""

    name: str
    policy: Policy
    origin: str
    """Package and entry point, or class."""

    @property
    def ours(self) -> bool:
        """Whether it belongs to this project."""
        return type(self.policy).__module__.partition(".")[0] == "muxtune"

    @property
    def options_model(self) -> type[BaseModel] | None:
        """Options that it declares, as a class ``Options`` of its own.

        Raises:
            PluginError: It is no pydantic model.
        """
        declared: object = getattr(self.policy, "Options", None)
        if declared is None:
            return None
        if not (isinstance(declared, type) and issubclass(declared, BaseModel)):
            raise PluginError(f"the policy {self.name!r} of {self.origin}: Options is no pydantic model")
        return declared

    def check_options(self, given: object) -> BaseModel | None:
        """Options of the policy's own, as the model that it declares; its defaults where none are given.

        Args:
            given: Values by key, as text or typed, or the model itself.

        Raises:
            SpecError: It has no such option, or the value is wrong.
        """
        model = self.options_model
        if model is not None and isinstance(given, model):
            return given
        if not isinstance(given, Mapping | None):
            raise SpecError(FLAG, given, "values by key")
        keys = dict(given or {})
        known = list(model.model_fields) if model is not None else []
        for key in keys:
            if key not in known:
                expected = f"one of {', '.join(known)}" if known else f"nothing: {self.name} has no options"
                raise SpecError(FLAG, key, expected)
        if model is None:
            return None
        try:
            return model.model_validate(keys)
        except ValidationError as error:
            first = complaints(error)[0]
            field = f"{FLAG} {first.path}" if first.path else FLAG
            raise SpecError(field, first.value, first.expected) from error

    @contextmanager
    def blamed(self, step: str = "propose") -> Iterator[None]:
        """Name the policy in whatever goes wrong with it; our own policies' failures are ours, and pass.

        Args:
            step: What is done with it, for messages.

        Raises:
            PluginError: The policy went wrong; has the package, its entry point and what happened.
        """
        try:
            yield
        except ProposalError as error:
            raise PluginError(f"the policy {self.name!r} of {self.origin}: {error}") from error
        except UserError:
            raise
        except Exception as error:
            if self.ours:
                raise
            reason = f"{step} raised {raised(error)}"
            raise PluginError(f"the policy {self.name!r} of {self.origin}: {reason}") from error


class ProposalError(Exception):
    """What a policy of another package did."""


def choose_policy(policy: str | Policy) -> ChosenPolicy:
    """A registered policy by its name, one of a file as ``FILE.py:CLASS``, or any object that is one.

    Plans have the name of an object's attribute ``name``, or else of its class.

    Raises:
        UserError: There is no such name, or the object has no ``propose``.
    """
    if isinstance(policy, str) and is_from_file(policy):
        return _chosen_object(policy_from_file(policy), policy)
    if isinstance(policy, str):
        found = POLICIES.get(policy)
        return ChosenPolicy(policy, found, POLICIES.origin(policy) or _class_of(found))
    return _chosen_object(policy, _class_of(policy))


def _chosen_object(policy: object, origin: str) -> ChosenPolicy:
    if isinstance(policy, type) or not callable(getattr(policy, "propose", None)):
        raise SpecError("policy", policy, "the name of a policy, or an object with `propose`")
    name = getattr(policy, "name", type(policy).__name__)
    if not isinstance(name, str) or not name:
        raise SpecError("policy.name", name, "a name")
    return ChosenPolicy(name, cast("Policy", policy), origin)


def _class_of(policy: object) -> str:
    return f"{type(policy).__module__}:{type(policy).__name__}"
