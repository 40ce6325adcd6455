"""What all tests share: small Hugging Face directories, and which tests are played and where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers import make_hf_model

# On tensors this small, the threads of torch only wait for each other, which costs several times the
# processor time of the work. Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test is about time, and machines are shared.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")

RUNS = "tests/integration/"
"""Where the tests are that start the processes of runs."""


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_hf_model(root / family, family) for family in ("llama", "gpt2")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave ``parity`` out unless it is asked for; a worker of pytest-xdist has the runs in front."""
    if "parity" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("parity")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("parity")]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(RUNS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """One worker plays all runs, as several at once would only compete for the cores; the others the rest.

    Modules stay whole, since their tests share fixtures. (xdist's own ``loadgroup`` does not group under
    pytest 9.2: pytest-xdist issue 1386.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class RunsOnOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return RUNS if nodeid.startswith(RUNS) else nodeid.partition("::")[0]

    return RunsOnOneWorker(config, log)
