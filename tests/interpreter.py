"""A process in which triton interprets its kernels on the CPU.

Triton decides when a kernel is defined, and transformers has often imported triton by the time that a test
runs; so this takes a process of its own, whatever the test session has loaded.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

Call = Callable[..., Any]
"""``call(function, *arguments)``, run elsewhere; both have to be picklable."""


@contextmanager
def process_with(environment: dict[str, str]) -> Iterator[Call]:
    """A fresh process with these variables set before anything of ours or triton's is imported."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_set_environment, initargs=(environment,)
    ) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def interpreter() -> Iterator[Call]:
    """For a fixture of module or session scope."""
    with process_with({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}) as call:
        yield call
