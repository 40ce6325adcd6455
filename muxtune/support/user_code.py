"""Objects that a user's own file defines, named ``FILE.py:NAME`` on the command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
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
    """Whether a name is that of an object in a file."""
    return _SEPARATOR in name


def object_from_file(name: str, option: str, usable: Callable[[object], bool], expected: str) -> object:
    """The object that ``FILE.py:NAME`` names. The file is executed again when it has changed.

    Args:
        name: File and object.
        option: Option of the command line that has the name, for messages.
        usable: Whether an object of the file may be meant; a refusal lists those that may.
        expected: What would be right, for a file without any.

    Raises:
        UserError: There is no such file, or no such object in it.
        PluginError: Loading it raised; the message names the file and says what it did.
    """
    path, _, attribute = name.rpartition(":")
    module = _load(Path(path).resolve(), content_digest(name))
    found = getattr(module, attribute, None)
    if found is None:
        own = [key for key, value in vars(module).items() if usable(value)]
        raise SpecError(f"{option} {path}", attribute, f"one of {', '.join(own)}" if own else expected)
    return found


def content_digest(name: str) -> str:
    """SHA-256 of the file of ``FILE.py:NAME``.

    Raises:
        UserError: The file cannot be read.
    """
    return sha256(read_user_bytes(Path(name.rpartition(":")[0]), "the file")).hexdigest()


@lru_cache(maxsize=64)
def _load(path: Path, digest: str) -> ModuleType:
    """Execute a file as a module of its own; ``digest`` is that of its content, so that an edit counts."""
    name = f"muxtune_user_{sha256(str(path).encode()).hexdigest()[:12]}_{digest[:12]}"
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
        raise PluginError(f"{path}: loading it raised {raised(error)}") from error
    return module
