"""A policy that a user's own file defines, named ``FILE.py:CLASS`` on the command line."""

from __future__ import annotations

from muxtune.support.registry import PluginError, raised
from muxtune.support.user_code import content_digest, is_from_file, object_from_file


def policy_from_file(name: str) -> object:
    """The object that ``FILE.py:CLASS`` names; of a class, an instance.

    Raises:
        UserError: There is no such file, or no such object in it.
        PluginError: Loading or making it raised; the message names the file and says what it did.
    """
    found = object_from_file(name, "--policy", _is_policy, "a class with `propose`")
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        path, _, attribute = name.rpartition(":")
        raise PluginError(f"the policy {attribute!r} of {path}: making it raised {raised(error)}") from error


def policy_identity(name: str) -> str:
    """A policy's name, with the digest of its file's content where it is of a file.

    Raises:
        UserError: The file cannot be read.
    """
    return f"{name} {content_digest(name)}" if is_from_file(name) else name


def _is_policy(value: object) -> bool:
    return callable(getattr(value, "propose", None))
