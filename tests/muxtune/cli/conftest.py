from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from muxtune.cli.app import main
from muxtune.costs import save_profile
from muxtune.graph.operators import COLLECTIVE_KINDS, Operator
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators

SUMS = [
    Operator(kind, (bytes_, 2))
    for kind in sorted(COLLECTIVE_KINDS)
    for bytes_ in (64, 4096, 1 << 20, 8 << 20)
]
"""Collectives of two ranks, as every session on processors measures them."""


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def call_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run a command line in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return Result(ended.value.code, streams.out, streams.err)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command line in this process and returns exit code and both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MUXTUNE_DEBUG", raising=False)

    return partial(call_main, capsys)


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.parquet"
    save_profile(make_profile(analytic_law(), [*operators(), *SUMS]), path)
    return path


def task(id_: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "peft": {"method": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 64,
        "learning_rate": 1e-3,
        "steps": 4,
    } | changes


@pytest.fixture
def write_workload(tmp_path):
    """Writes a workload file; without arguments one of three mixed tasks."""

    def write(*tasks: dict[str, Any], **fields: Any) -> Path:
        content = {
            "backbone": "llama-tiny",
            "tasks": list(tasks)
            or [
                task("a"),
                task("b", micro_batch_size=2),
                task("c", dataset={"lengths": "rte"}, max_length=256, micro_batch_size=2),
            ],
        } | fields
        path = tmp_path / "workload.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


@pytest.fixture
def plan_path(cli, write_workload, profile_path, tmp_path) -> Path:
    result = cli("plan", "--workload", write_workload(), "--profile", profile_path)
    assert result.code == 0, result.err
    return tmp_path / "plan.json"
