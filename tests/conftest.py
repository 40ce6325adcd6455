"""Small Hugging Face directories, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import make_hf_model


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_hf_model(root / family, family) for family in ("llama", "gpt2")}
