"""How this program was started, for commands that a person is to type next."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

_PROGRAM = "muxtune"


def program_name() -> str:
    """What to type to start this program again, from the current directory.

    Its name where the shell finds it; else the path of the script that was started, relative where that is
    shorter; else the interpreter with the module.
    """
    started = Path(sys.argv[0])
    found = shutil.which(_PROGRAM)
    if started.name == _PROGRAM and started.is_file():
        if found is not None and Path(found).resolve() == started.resolve():
            return _PROGRAM
        return _shorter(started.absolute())
    beside = Path(sys.executable).with_name(_PROGRAM)
    if found is not None and beside.exists() and Path(found).resolve() == beside.resolve():
        return _PROGRAM
    if beside.exists():
        return _shorter(beside)
    return f"{_shorter(Path(sys.executable))} -m {_PROGRAM}"


def _shorter(path: Path) -> str:
    """A path from here, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
