"""What all tests share: small Hugging Face directories, and which tests are played and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers import make_hf_model
from tests.sampling import examples
from tests.scheduling import longest_first, scope_of

# No test is about time, and machines are shared.
settings.register_profile("untimed", settings(), deadline=None, max_examples=examples(100))
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_hf_model(root / family, family) for family in ("llama", "gpt2")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave ``parity`` out unless it is asked for; a worker of pytest-xdist has long modules in front."""
    if "parity" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("parity")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("parity")]
    if hasattr(config, "workerinput"):
        items[:] = longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Workers take module after module, in the order of collection.

    (xdist's own ``loadgroup`` does not group under pytest 9.2: pytest-xdist issue 1386.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ModulesInTurn(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ModulesInTurn(config, log)
