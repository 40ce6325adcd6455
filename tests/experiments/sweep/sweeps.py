"""Small sweeps with made-up costs, quick to plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.support.errors import UserError
from muxtune.tasks import Workload
from tests.muxtune.planning.problems import FakeCosts


@dataclass(frozen=True)
class FakeSource:
    """Costs of a made-up device; none for clusters of three."""

    launch_s: float = 20e-6

    def __call__(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
        if cluster.ranks == 3:
            raise UserError("no costs of three ranks")
        return FakeCosts(launch_s=self.launch_s)

    def prepare(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> None:
        pass


def task(id_: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "peft": {"method": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 64,
        "learning_rate": 1e-3,
        "steps": 2,
    } | changes


BASE: dict[str, Any] = {
    "workload": {"backbone": "llama-tiny", "tasks": [task("a"), task("b", max_length=32)]},
    "cluster": "cpu-2",
}


def write_sweep(folder: Path, **fields: Any) -> Path:
    """A sweep file with the fields of ``BASE`` where none are given."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(BASE | fields, sort_keys=False))
    return path
