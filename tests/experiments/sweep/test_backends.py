"""Where batches run."""

from __future__ import annotations

from importlib.util import find_spec

import pandas as pd
import pytest

from experiments.sweep import backends, run_sweep
from muxtune.support.errors import UserError
from tests.experiments.sweep.sweeps import FakeSource, write_sweep

GRID = {"policy": ["muxtune", "nemo"], "workload.tasks[*].micro_batch_size": [1, 2, 4, 8, 3]}


def test_ray_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    path = write_sweep(tmp_path, grid=GRID)
    with pytest.raises(UserError, match=r"--backend ray needs Ray: pip install 'muxtune\[ray\]'"):
        run_sweep(path, tmp_path / "r.parquet", source=FakeSource(), backend="ray")
    assert not list(tmp_path.glob("r.parquet*"))


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'muxtune[ray]'")
def test_ray_writes_the_rows_of_one_process(tmp_path):
    import ray

    path = write_sweep(tmp_path, grid=GRID)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        summary = run_sweep(path, tmp_path / "ray.parquet", source=FakeSource(), backend="ray", jobs=2)
    finally:
        ray.shutdown()
    run_sweep(path, tmp_path / "one.parquet", source=FakeSource(), jobs=1)
    assert (summary.planned, summary.refused) == (8, 2)
    found, expected = (
        pd.read_parquet(tmp_path / name).drop(columns="planning_s") for name in ("ray.parquet", "one.parquet")
    )
    pd.testing.assert_frame_equal(found, expected)
