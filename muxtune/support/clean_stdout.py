"""Keeps a result on stdout apart from what libraries and child processes print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from muxtune.support.files import descriptor_moved

_STDOUT, _STDERR = 1, 2


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send to stderr whatever is printed inside: by us, by C++ libraries (gloo does), by child processes."""
    sys.stdout.flush()
    saved = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr), descriptor_moved(_STDOUT, saved):
            yield
    finally:
        os.dup2(saved, _STDOUT)
        os.close(saved)
