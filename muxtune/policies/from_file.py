"""A policy that a user's own file defines, named ``FILE.py:CLASS`` on the command line."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import redirect_stdout
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from muxtune.support.errors import SpecError
from muxtune.support.registry import PluginError, raised
from muxtune.support.user_files import read_user_bytes

_SEPARATOR = ".py:"


def is_from_file(name: str) -> bool:
    """Whether a policy's name is that of an object in a file."""
    return _SEPARATOR in name


def policy_from_file(name: str) -> object:
    """The object that ``FILE.py:CLASS`` names; of a class, an instance.

    The file is executed again when it has changed.

    Raises:
        UserError: There is no such file, or no such object in it.
        PluginError: Loading it raised; the message names the file and says what it did.
    """
    path, _, attribute = name.rpartition(":")
    module = _load(Path(path).resolve(), _content_digest(path))
    found = getattr(module, attribute, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(getattr(value, "propose", None))]
        expected = f"one of {', '.join(own)}" if own else "a class with `propose`"
        raise SpecError(f"--policy {path}", attribute, expected)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        raise PluginError(f"the policy {attribute!r} of {path}: making it raised {raised(error)}") from error


def policy_identity(name: str) -> str:
    """A policy's name, with the digest of its file's content where it is of a file.

    Raises:
        UserError: The file cannot be read.
    """
    return f"{name} {_content_digest(name.rpartition(':')[0])}" if is_from_file(name) else name


def _content_digest(path: str) -> str:
    return sha256(read_user_bytes(Path(path), "the policy's file")).hexdigest()


@lru_cache(maxsize=64)
def _load(path: Path, digest: str) -> ModuleType:
    """Execute a file as a module of its own; ``digest`` is that of its content, so that an edit counts."""
    name = f"muxtune_policy_{sha256(str(path).encode()).hexdigest()[:12]}_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic models look themselves up there
    try:
        with redirect_stdout(sys.stderr):  # a command's output is its own
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is not ours: whatever it does is its own fault
        del sys.modules[name]
        raise PluginError(f"the policies of {path}: loading it raised {raised(error)}") from error
    return module
