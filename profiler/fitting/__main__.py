"""``python -m profiler.fitting PART ...``: one command per part of a device model (``PART --help``)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from muxtune.support.errors import UserError, unknown_name

PARTS = {
    "collectives": "profiler.fitting.collectives",
    "gemm": "profiler.fitting.gemm_command",
    "pointwise": "profiler.fitting.pointwise",
}
"""Modules with a ``main(arguments: Sequence[str]) -> None``, by the name of what they fit."""

_USER_ERROR = 2


def main(arguments: Sequence[str]) -> None:
    """Hand the arguments after the part's name to that part's own command.

    Raises:
        UserError: No such part.
    """
    part, *others = arguments or ["--help"]
    if part in {"-h", "--help"}:
        print(f"usage: python -m profiler.fitting {{{','.join(PARTS)}}} [--help] ...")
        return
    if part not in PARTS:
        raise unknown_name("part", part, PARTS)
    command: Callable[[Sequence[str]], None] = import_module(PARTS[part]).main
    command(others)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"profiler.fitting: {error}", file=sys.stderr)
        raise SystemExit(_USER_ERROR) from None
