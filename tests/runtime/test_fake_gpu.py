"""The operators on another device than the CPU where there is none: tensors that only know where they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MISTAKE = """
import torch
import runtime.operators
from tests.runtime import fake_gpu

def ids_on_the_host(content, n):
    return torch.zeros(n, dtype=torch.int64)

runtime.operators._Content.ids = ids_on_the_host
fake_gpu.main()
"""


def run(*arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code, and what was said of each operator."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stdout, done.stderr
    lines = (line.split(" @ ", maxsplit=1) for line in done.stdout.splitlines())
    return done.returncode, dict(lines)


@pytest.mark.slow
@pytest.mark.integration
def test_every_operator_keeps_to_its_device_and_reads_nothing_on_the_host():
    code, said = run("-m", "tests.runtime.fake_gpu")
    assert {name: words for name, words in said.items() if words != "ok"} == {}
    assert code == 0
    assert any("stage" in name for name in said)


@pytest.mark.slow
@pytest.mark.integration
def test_a_tensor_left_on_the_host_is_found_out():
    code, said = run("-c", MISTAKE)
    assert code == 1
    wrong = {name.split()[2].partition("(")[0] for name, words in said.items() if words != "ok"}
    assert wrong == {"embedding", "head"}
    assert all("same device" in words for words in said.values() if words != "ok")
