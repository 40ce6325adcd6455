"""The Python example of README.md, played on made-up costs, prints what the page says."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.documents import load_page

README = load_page("README.md")


@pytest.mark.slow
@pytest.mark.integration
def test_the_python_example_prints_what_the_readme_says(
    tmp_path, monkeypatch, capsys, quick_ranks, made_up_profile
):
    for name in ("workload.yaml", "loop.py"):
        (tmp_path / name).write_text(README.example(name))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("loop.py")
    printed = capsys.readouterr().out
    assert shape(printed) == shape(README.example("loop.out"))
    assert float(printed.split()[-1]) < 1e-5
    assert {path.name for path in (tmp_path / "run" / "tasks").iterdir()} == {"reviews", "questions"}


def shape(output: str) -> str:
    """Output with every number blanked out."""
    return re.sub(r"\b\d[\d.]*(e-?\d+)?", "#", output)
